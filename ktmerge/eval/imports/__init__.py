"""Scores that other harnesses measured (lm_eval, lmms-eval, VLMEvalKit), read and joined into score files of ours."""
