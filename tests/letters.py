"""Characters for texts that hypothesis makes up."""

LETTERS = "".join(map(chr, range(0x180))) + "\u0915\u2028\u3042\ufeff\U0001f600\U0010ffff"
"""Of every kind: of all there are hypothesis would first make a table, which takes seconds on a fresh machine."""
