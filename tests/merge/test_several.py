"""Methods for several experts, element by element and by angle: what each must give where the answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from merge_memory import MATRIX, NORM, Workbench, noise
from merge_models import Tensors
from torch import Tensor

from ktmerge.checkpoints.matrices import MatrixLayout
from ktmerge.errors import UsageError
from ktmerge.merge.gram import GramObserver
from ktmerge.merge.kernels import kernels_for
from ktmerge.merge.quantiles import RankedMagnitudes, quantile_rank
from ktmerge.merge.stage import Context

ULP = 2.0**-20


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("bench"))


def vectors(**experts: Any) -> dict[str, Tensors]:
    """Deltas of one vector."""
    return {name: {NORM: torch.as_tensor(values, dtype=torch.float32)} for name, values in experts.items()}


def merge(bench: Workbench, method: str, experts: dict[str, Tensors], **blend: Any) -> Tensor:
    weights = blend.pop("weights", None)
    merged = bench.merged(experts, {"method": method, **blend}, weights=weights)
    return merged[NORM] if NORM in merged else merged[MATRIX]


def matrices(count: int, *shape: int, seed: int = 0) -> dict[str, Tensors]:
    generator = torch.Generator().manual_seed(seed)
    return {name: {MATRIX: 0.02 * torch.randn(*shape, generator=generator)} for name in "abcdef"[:count]}


def theirs(method: str, experts: dict[str, Tensors], name: str, base: Tensor | None, **parameters: Any) -> Tensor:
    """What mergekit gives, as a delta from ``base``, or over the deltas themselves without one."""
    from mergekit.merge_methods.api import merge_tensors

    ids = sorted(experts)
    tensors = [experts[expert][name] for expert in ids]
    if base is None:
        return merge_tensors(tensors, method, parameters=parameters, ids=ids, name=name)
    tensors = [base, *(base + one for one in tensors)]
    merged = merge_tensors(tensors, method, parameters=parameters, ids=["base", *ids], base_index=0, name=name)
    return merged - base


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


ALL = ["magmax", "ram", "ram_plus", "sce", "pcb", "consensus", "emr_unified", "tatr", "metagpt", "localize_stitch",
       "slerp", "nuslerp", "warp", "nmean", "karcher", "model_stock"]  # fmt: skip


@pytest.mark.parametrize("method", ALL)
def test_an_expert_and_its_opposite_cancel(bench: Workbench, method: str) -> None:
    delta = noise(3)
    merged = bench.merged({"a": delta, "b": {key: -values for key, values in delta.items()}}, {"method": method})
    assert all(not values.any() for values in merged.values())


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "warp", "nmean", "karcher", "model_stock"])
def test_one_expert_froze_a_tensor(bench: Workbench, method: str) -> None:
    deltas = matrices(2, 6, 5)
    deltas["b"][MATRIX].zero_()
    merged = merge(bench, method, deltas)
    own = deltas["a"][MATRIX]
    close(merged, own if method in ("nmean", "karcher", "model_stock") else 0.5 * own)


# --- MagMax, EMR ----------------------------------------------------------------------------------------------------


def test_magmax_decides_between_equals_by_the_sum(bench: Workbench) -> None:
    experts = vectors(a=[2.0, 2, 2, -3, 0], b=[-2.0, -2, -2, 1, 0], c=[1.0, -1, 0, 3, 0])
    expected = [2.0, -2.0, 0.0, 3.0, 0.0]
    assert merge(bench, "magmax", experts).tolist() == expected
    renamed = {"a": experts["c"], "b": experts["a"], "c": experts["b"]}
    assert merge(bench, "magmax", renamed).tolist() == expected


def test_magmax_weighs_changes(bench: Workbench) -> None:
    experts = vectors(a=[2.0, 1.0], b=[-1.5, 0.5])
    assert merge(bench, "magmax", experts, weights={"a": 0.5, "b": 1.5}).tolist() == [-2.25, 0.75]


def test_emr_masks_and_rescalers_bring_signs_and_sizes_back(bench: Workbench) -> None:
    experts = {name: tensors[MATRIX].view(-1) for name, tensors in matrices(3, 20, 15).items()}
    unified = merge(bench, "emr_unified", vectors(**experts))
    for delta in experts.values():
        mask = (delta * unified) > 0
        rescaled = delta.abs().sum() / (mask * unified).abs().sum() * mask * unified
        assert (rescaled * delta >= 0).all()
        assert (rescaled != 0).equal(mask)
        torch.testing.assert_close(rescaled.abs().sum(), delta.abs().sum())
        assert (unified.abs()[mask] >= delta.abs()[mask]).all()


# --- RAM ------------------------------------------------------------------------------------------------------------


def test_ram_averages_only_what_is_shared(bench: Workbench) -> None:
    experts = vectors(a=[1.0, 0, 4, 0], b=[3.0, 2, 0, 0])
    assert merge(bench, "ram", experts).tolist() == [2.0, 2.0, 4.0, 0.0]
    plus = merge(bench, "ram_plus", experts, r=0.5, alpha=2.0)  # one shared, one own each
    assert plus.tolist() == [2.0, 3.0, 6.0, 0.0]


def test_ram_takes_less_than_half_a_step_of_the_base_for_rounding(bench: Workbench) -> None:
    base = {NORM: torch.tensor([1.0, 1.0, 1.5, 2.0**-10])}
    steps = torch.tensor([2.0**-8, 2.0**-8 - 2.0**-20, -(2.0**-8), 2.0**-20])
    stored = bench.blend(base, {"a": {NORM: base[NORM] + steps}}, {"method": "ram"})[NORM]
    assert ((stored - base[NORM]) != 0).tolist() == [True, False, True, False]


def test_ram_is_mergekits_where_every_change_counts(bench: Workbench) -> None:
    experts = matrices(3, 8, 6)
    for name, share in (("a", 0.2), ("b", 0.5), ("c", 0.7)):
        experts[name][MATRIX][torch.rand(8, 6, generator=torch.Generator().manual_seed(len(name))) < share] = 0
    zero = torch.zeros(8, 6)
    close(merge(bench, "ram", experts, epsilon=0.0), theirs("ram", experts, MATRIX, zero, epsilon=0.0))
    ours = merge(bench, "ram_plus", experts, epsilon=0.0, scope="tensor")
    close(ours, theirs("ramplus_tl", experts, MATRIX, zero, epsilon=1e-12))
    small = {name: {MATRIX: 1e-6 * tensors[MATRIX]} for name, tensors in experts.items()}
    assert not theirs("ram", small, MATRIX, zero).any()  # below an epsilon of 1e-5, whatever the base
    assert merge(bench, "ram", small).any()


# --- SCE ------------------------------------------------------------------------------------------------------------


def test_sce_of_experts_that_do_not_differ_is_the_base(bench: Workbench) -> None:
    delta = noise(3)
    one = bench.merged({"a": delta}, {"method": "sce", "select_topk": 0.9})
    same = bench.merged(dict.fromkeys("abc", delta), {"method": "sce", "select_topk": 0.9})
    assert not any(values.any() for merged in (one, same) for values in merged.values())
    assert bench.merged({"a": delta}, {"method": "sce", "select_topk": 1.0})[MATRIX].equal(delta[MATRIX])


def test_sce_selects_exactly_k_however_many_tie(bench: Workbench) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (ULP * torch.randint(1, 3, (400,), generator=generator).float() for _ in range(2))
    different = int((a != b).sum())
    for share in (0.1, 0.5, 0.99):
        merged = merge(bench, "sce", vectors(a=a, b=b), select_topk=share)
        assert int(merged.count_nonzero()) == int(share * different)


@pytest.mark.parametrize("select_topk", [0.1, 0.5, 1.0])
def test_sce_is_mergekits(bench: Workbench, select_topk: float) -> None:
    experts = {name: {MATRIX: 10 * tensors[MATRIX]} for name, tensors in matrices(3, 12, 10).items()}
    ours = merge(bench, "sce", experts, select_topk=select_topk)
    close(ours, theirs("sce", experts, MATRIX, torch.zeros(12, 10), select_topk=select_topk))


def test_sce_of_small_changes_keeps_their_size(bench: Workbench) -> None:
    experts = {name: {MATRIX: 1e-3 * tensors[MATRIX]} for name, tensors in matrices(3, 12, 10).items()}
    large = {name: {MATRIX: 2**20 * tensors[MATRIX]} for name, tensors in experts.items()}
    assert (merge(bench, "sce", experts) * 2**20).equal(merge(bench, "sce", large))


def test_sce_may_set_the_weights_only(bench: Workbench) -> None:
    experts = vectors(a=[1.0, 3, 0, 1], b=[1.0, 1, 0, 2])  # the second and fourth differ, the second most
    masked = merge(bench, "sce", experts, select_topk=0.5)
    assert masked.tolist() == pytest.approx([0, (9 * 3 + 1) / 10, 0, 0])
    unmasked = merge(bench, "sce", experts, select_topk=0.5, mask_deltas=False)
    assert unmasked.tolist() == pytest.approx([1, (9 * 3 + 1) / 10, 0, (9 + 2) / 10])


# --- PCB ------------------------------------------------------------------------------------------------------------


def test_pcb_of_one_expert_is_its_top(bench: Workbench) -> None:
    delta = noise(3, a=(40, 25))["a"]
    merged = merge(bench, "pcb", {"a": {MATRIX: delta}}, density=0.1)
    kept = merged != 0
    assert merged[kept].equal(delta[kept])
    assert int(kept.sum()) == 100
    assert delta[kept].abs().min() >= delta[~kept].abs().max()


def test_pcb_outliers_do_not_decide(bench: Workbench) -> None:
    experts = matrices(2, 40, 25)
    before = merge(bench, "pcb", experts)
    for tensors in experts.values():
        tensors[MATRIX][0, 0] = 1e4
    after = merge(bench, "pcb", experts)
    before[0, 0] = after[0, 0] = 0
    assert ((before != 0) == (after != 0)).float().mean() > 0.98


# --- CABS -----------------------------------------------------------------------------------------------------------


def test_cabs_keeps_n_of_m_apart_from_one_another(bench: Workbench) -> None:
    experts = {name: {MATRIX: tensors[MATRIX]} for name, tensors in matrices(2, 16, 24).items()}
    merged = merge(bench, "cabs", experts, n=4, m=8)
    own = [merged == tensors[MATRIX] for tensors in experts.values()]
    assert (own[0] ^ own[1]).all()
    assert (own[0].view(-1, 8).sum(1) == 4).all()
    first = experts["a"][MATRIX].view(-1, 8).abs()
    kept = own[0].view(-1, 8)
    assert (first.where(kept, 9).min(1).values >= first.where(~kept, 0).max(1).values).all()


def test_cabs_shares_only_what_it_must(bench: Workbench) -> None:
    experts = {name: {MATRIX: tensors[MATRIX]} for name, tensors in matrices(2, 4, 8).items()}
    both = merge(bench, "cabs", experts, n=6, m=8) == experts["a"][MATRIX] + experts["b"][MATRIX]
    assert (both.view(-1, 8).sum(1) == 4).all()  # 6 of each, 2 of the second where the first kept none


def test_cabs_goes_by_names_and_takes_any_size(bench: Workbench) -> None:
    experts = matrices(2, 5, 7)
    first = merge(bench, "cabs", experts, n=2, m=8)
    turned = merge(bench, "cabs", {"a": experts["b"], "b": experts["a"]}, n=2, m=8)
    assert not first.equal(turned)
    assert int(first.count_nonzero()) == 4 * 4 + 3  # 35 elements: 4 blocks, and one of 3
    ties = {name: {MATRIX: torch.full((8, 8), ULP)} for name in "ab"}
    assert int(merge(bench, "cabs", ties, n=2, m=8).count_nonzero()) == 32


# --- consensus, trust region, norms, stitching ----------------------------------------------------------------------


def test_consensus_ends(bench: Workbench) -> None:
    deltas = {name: noise(seed) for seed, name in enumerate("abc")}
    arithmetic = bench.merged(deltas, {"method": "task_arithmetic"})
    everything = bench.merged(deltas, {"method": "consensus", "agree": 0})
    nothing = bench.merged(deltas, {"method": "consensus", "agree": 4})
    for name, values in arithmetic.items():
        assert values.equal(everything[name])
        assert not nothing[name].any()


def test_consensus_drops_the_selfish_and_the_catastrophic(bench: Workbench) -> None:
    # one moves alone; two agree; both are outweighed by the third; a frozen expert has no vote
    experts = vectors(a=[5.0, 1.0, 1.0], b=[0.0, 1.0, 1.0], c=[0.0, 0.0, -9.0], d=[0.0, 0.0, 0.0])
    assert merge(bench, "consensus", experts).tolist() == [0.0, 2.0, 0.0]
    assert merge(bench, "consensus", experts, agree=1).tolist() == [5.0, 2.0, -7.0]


def test_trust_region_drops_what_both_move(bench: Workbench) -> None:
    a = torch.arange(1.0, 101.0)
    b = torch.cat([torch.zeros(90), torch.ones(10)])
    merged = merge(bench, "tatr", vectors(a=a, b=b), quantile=0.96, scope="tensor")
    assert (merged == 0).nonzero().view(-1).tolist() == [96, 97, 98, 99]
    assert merged[:96].equal((a + b)[:96])


@pytest.mark.parametrize("method", ["metagpt", "nan"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_equal_norms_give_the_mean(bench: Workbench, method: str, scope: str) -> None:
    experts = vectors(a=[3.0, 4.0, 0.0], b=[0.0, -3.0, 4.0], c=[0.0, 0.0, 0.0])
    merged = merge(bench, method, experts, scope=scope)
    torch.testing.assert_close(merged, torch.tensor([1.5, 0.5, 2.0]))  # of the two that moved


def test_metagpt_shares_are_squared_norms(bench: Workbench) -> None:
    experts = {name: {MATRIX: torch.full((4, 4), v), NORM: torch.full((2,), w)}
               for name, v, w in (("a", 1.0, 5.0), ("b", 2.0, 0.0))}  # fmt: skip
    local = bench.merged(experts, {"method": "metagpt", "scope": "tensor"})
    assert local[MATRIX].unique().tolist() == pytest.approx([(16 + 2 * 64) / 80])
    whole = bench.merged(experts, {"method": "metagpt"})
    assert whole[MATRIX].unique().tolist() == pytest.approx([(66 + 2 * 64) / 130])
    assert whole[NORM].unique().tolist() == pytest.approx([5 * 66 / 130])


def test_stitching_averages_only_what_meets(bench: Workbench) -> None:
    experts = vectors(a=[8.0, 1, 6, 0.5], b=[4.0, 0.5, 1, -7])
    merged = merge(bench, "localize_stitch", experts, density=0.5)
    assert merged.tolist() == [6.0, 0.0, 6.0, -7.0]


# --- angles ---------------------------------------------------------------------------------------------------------


def test_slerp_ends_are_the_experts(bench: Workbench) -> None:
    experts = matrices(2, 6, 5)
    for granularity in ("tensor", "row", "column"):
        assert merge(bench, "slerp", experts, t=0.0, granularity=granularity).equal(experts["a"][MATRIX])
        assert merge(bench, "slerp", experts, t=1.0, granularity=granularity).equal(experts["b"][MATRIX])


def test_slerp_keeps_the_length_and_the_share_of_the_angle(bench: Workbench) -> None:
    merged = merge(bench, "slerp", vectors(a=[2.0, 0.0], b=[0.0, 2.0]), t=1 / 3)
    close(merged, 2 * torch.tensor([3**0.5 / 2, 0.5]))
    assert merge(bench, "slerp", vectors(a=[1.0, 0.0], b=[0.0, 1.0]), weights={"a": 3.0, "b": 1.0})[0] > 0.9


def test_slerp_where_there_is_no_arc_is_a_line(bench: Workbench) -> None:
    a = torch.tensor([1.0, 2.0, -3.0])
    assert merge(bench, "slerp", vectors(a=a, b=-a), t=0.25).tolist() == pytest.approx((0.5 * a).tolist())
    assert merge(bench, "slerp", vectors(a=a, b=0 * a), t=0.25).tolist() == pytest.approx((0.75 * a).tolist())
    assert merge(bench, "slerp", vectors(a=a, b=3 * a), t=0.25).tolist() == pytest.approx((1.5 * a).tolist())


@pytest.mark.parametrize(
    ("granularity", "options"),
    [
        ("tensor", {}),
        ("row", {"nuslerp_flatten": False}),
        ("column", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
)
def test_nuslerp_is_mergekits(bench: Workbench, granularity: str, options: dict[str, Any]) -> None:
    experts = matrices(2, 6, 5)
    weights = {"a": 1.0, "b": 0.4}
    ours = merge(bench, "nuslerp", experts, weights=weights, granularity=granularity)
    close(ours, theirs("nuslerp", experts, MATRIX, torch.zeros(6, 5), weight=weights, **options))


def test_warp_of_two_is_half_way_on_the_arc(bench: Workbench) -> None:
    experts = matrices(2, 6, 5)
    assert merge(bench, "warp", experts).equal(merge(bench, "slerp", experts, t=0.5))


def test_karcher_of_two_of_equal_length_is_half_way_on_the_arc(bench: Workbench) -> None:
    experts = matrices(2, 6, 5)
    experts["b"][MATRIX] *= experts["a"][MATRIX].norm() / experts["b"][MATRIX].norm()
    close(merge(bench, "karcher", experts), merge(bench, "slerp", experts, t=0.5))


def test_karcher_mean_is_where_the_tangents_cancel(bench: Workbench) -> None:
    experts = matrices(3, 2, 2, seed=5)
    weights = {"a": 1.0, "b": 0.5, "c": 2.0}
    mean = merge(bench, "karcher", experts, weights=weights, iterations=100).double()
    mean = mean / mean.norm()
    tangent = torch.zeros_like(mean)
    for name, tensors in experts.items():
        unit = tensors[MATRIX].double() / tensors[MATRIX].double().norm()
        angle = torch.acos((mean * unit).sum())
        tangent += weights[name] * angle / angle.sin() * (unit - angle.cos() * mean)
    assert tangent.norm() < 1e-6


def test_karcher_is_mergekits_on_deltas(bench: Workbench) -> None:
    experts = matrices(3, 12, 10)
    close(merge(bench, "karcher", experts), theirs("karcher", experts, MATRIX, None), 1e-5)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_nmean_is_mergekits_multislerp(bench: Workbench, count: int) -> None:
    experts = matrices(count, 12, 10)
    weights = dict(zip("abcd", [1.0, 0.25, 0.5, 2.0][:count], strict=False))
    ours = merge(bench, "nmean", experts, weights=weights)
    close(ours, theirs("multislerp", experts, MATRIX, torch.zeros(12, 10), weight=weights), 1e-5)


def test_directions_that_cancel_have_the_plain_mean(bench: Workbench) -> None:
    experts = vectors(a=[2.0, 0.0], b=[-1.0, 0.0])
    for method in ("nmean", "karcher"):
        assert merge(bench, method, experts).tolist() == pytest.approx([0.5, 0.0])


# --- Model Stock ----------------------------------------------------------------------------------------------------


def test_stock_between_the_mean_and_the_base(bench: Workbench) -> None:
    assert merge(bench, "model_stock", vectors(a=[1.0, 0.0], b=[0.0, 2.0])).tolist() == [0.0, 0.0]
    half = merge(bench, "model_stock", vectors(a=[1.0, 0.0], b=[0.5, 3**0.5 / 2]))  # cosine 1/2: t = 2/3
    close(half, torch.tensor([0.5, 3**0.5 / 6]))


def test_stock_of_opposing_experts_is_the_base(bench: Workbench) -> None:
    directions = torch.eye(4) - 0.29  # four that lean away from one another
    experts = vectors(**{name: 1e-2 * directions[n] for n, name in enumerate("abcd")})
    cosine = float(directions[0] @ directions[1] / directions[0].norm() ** 2)
    assert cosine < -0.3
    assert not merge(bench, "model_stock", experts).any()
    assert theirs("model_stock", experts, NORM, torch.zeros(4)).norm() > 2e-2  # beyond every expert


def test_stock_counts_the_experts_that_moved(bench: Workbench) -> None:
    experts = matrices(2, 6, 5)
    experts["b"][MATRIX] += experts["a"][MATRIX]
    two = merge(bench, "model_stock", experts)
    frozen = {**experts, "c": {MATRIX: torch.zeros(6, 5)}}
    assert merge(bench, "model_stock", frozen).equal(two)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_stock_is_mergekits_where_experts_agree(bench: Workbench, granularity: str) -> None:
    experts = matrices(3, 6, 30)
    for tensors in experts.values():
        tensors[MATRIX] += 0.02
    ours = merge(bench, "model_stock", experts, granularity=granularity)
    expected = theirs("model_stock", experts, MATRIX, torch.zeros(6, 30), filter_wise=granularity == "row")
    close(ours, expected, 1e-5)
    tiny = {name: {MATRIX: 2.0**-14 * tensors[MATRIX]} for name, tensors in experts.items()}
    assert merge(bench, "model_stock", tiny, granularity=granularity).equal(2.0**-14 * ours)


# --- OPCM -----------------------------------------------------------------------------------------------------------


def test_opcm_has_the_mean_norm_and_an_order(bench: Workbench) -> None:
    experts = matrices(3, 8, 6)
    merged = merge(bench, "opcm", experts)
    mean = torch.stack([tensors[MATRIX].norm() for tensors in experts.values()]).mean()
    torch.testing.assert_close(merged.norm(), mean)
    turned = {"a": experts["c"], "b": experts["b"], "c": experts["a"]}
    assert not torch.allclose(merged, merge(bench, "opcm", turned))


def test_opcm_adds_only_what_is_not_held(bench: Workbench) -> None:
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    other = delta.clone()
    other[0, 1], other[2, 0] = 5.0, 7.0
    merged = merge(bench, "opcm", {"a": {MATRIX: delta}, "b": {MATRIX: other}}, alpha=0.7, scope="tensor")
    expected = delta.clone()
    expected[2, 0] = 7.0  # the diagonal is held, and so is what lies between the first two directions
    close(merged / merged.norm(), expected / expected.norm())


# --- what they rest on ----------------------------------------------------------------------------------------------


def context(shape: tuple[int, ...], start: int, base: Tensor, transposed: bool = False) -> Context:
    return Context(
        tensor="x", part="", layers={}, tensor_class="matrix", shape=shape, start=start, seed=1, experts=("a", "b"),
        weights=(1.0, 1.0), base=base, kernels=kernels_for(torch.device("cpu")),
        layout=MatrixLayout(transposed, (shape[-1 if transposed else -2],)),
    )  # fmt: skip


@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
@pytest.mark.parametrize("transposed", [False, True])
def test_inner_products_do_not_depend_on_pieces(granularity: Any, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *deltas = (torch.randn(3, 8, 6, generator=generator) ** 5 for _ in range(3))
    found = []
    for size in (144, 7, 50):
        observer = GramObserver(granularity)
        while not observer.done:
            pieces = [slice(start, start + size) for start in range(0, 144, size)]
            for piece in reversed(pieces):
                shown = [delta.view(-1)[piece] for delta in deltas]
                observer.observe(shown, context((3, 8, 6), piece.start, base.view(-1)[piece], transposed))
            observer.end_pass()
        found.append(observer.result())
    assert all(one is not None and (one.products == found[0].products).all() for one in found)
    by_row = granularity == ("column" if transposed else "row")
    axes = {True: (-1,), False: (-2,)}[by_row] if granularity != "tensor" else (-3, -2, -1)
    stack = torch.stack(deltas).double()
    expected = (stack[:, None] * stack[None]).sum(list(axes)).reshape(2, 2, -1).permute(2, 0, 1)
    lengths = expected.diagonal(dim1=1, dim2=2).sqrt()
    error = torch.from_numpy(found[0].products) - expected
    assert ((error / (lengths[:, :, None] * lengths[:, None, :])).abs() < 2e-10).all()  # values are of 34 bits


def test_ranked_magnitudes_are_those_of_a_sort() -> None:
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0)) ** 3
    values[::7] = 0
    values[3::11] = -0.125
    ordered = values.abs().sort().values
    ranks = [quantile_rank(share, 1001) for share in (0.0, 0.01, 0.3, 0.5, 0.99, 1.0)]
    ranked = RankedMagnitudes(ranks)
    while not ranked.done:
        for piece in values.split(100):
            ranked.add(piece)
        ranked.end_pass()
    assert ranks == [0, 10, 300, 500, 990, 1000]
    assert ranked.values == [float(ordered[rank]) for rank in ranks]


def test_knots_adds_what_experts_did_to_different_outputs(bench: Workbench) -> None:
    first, second = noise(1), noise(2)
    first[MATRIX][::2] = 0
    second[MATRIX][1::2] = 0
    merged = bench.merged({"a": first, "b": second}, {"method": "knots", "density": 1.0})[MATRIX]
    assert torch.allclose(merged, first[MATRIX] + second[MATRIX], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "weights", "parameters", "expected"),
    [
        ("sce", {"a": 1.0, "b": -1.0}, {}, "0 or more, one of them positive"),
        ("karcher", {"a": 0.0, "b": 0.0}, {}, "0 or more, one of them positive"),
        ("magmax", {"a": 0.0, "b": 0.0}, {}, "all expert weights are 0"),
        ("emr_unified", {"a": 1.0, "b": 2.0}, {}, "would ignore the unequal expert weights"),
        ("warp", {"a": 1.0, "b": 1.0, "c": 1.0}, {"t": 0.5}, "give the experts weights instead"),
        ("slerp", {"a": 1.0, "b": 1.0, "c": 1.0}, {}, "takes 2 experts, not 3"),
        ("model_stock", {"a": 1.0}, {}, "takes 2 or more experts, not 1"),
        ("cabs", {"a": 1.0, "b": 1.0}, {"n": 9, "m": 8}, "choose n up to m"),
        ("resmerge", {"a": 1.0, "b": 1.0}, {"beta_min": 1.5}, "beta_min = 1.5 is above beta_max = 1;"),
        ("lm_cocktail", {"a": 1.0, "b": 1.0}, {"losses": {"a": 1.0}}, r"one for each expert \(a, b\)"),
        ("lm_cocktail", {"a": 1.0}, {"losses": {"a": float("inf")}}, "for each name, not inf"),
        ("opcm", {"a": 1.0, "b": 2.0}, {}, "give all experts the same"),
    ],
)
def test_mistakes(
    bench: Workbench, method: str, weights: dict[str, float], parameters: dict[str, Any], expected: str
) -> None:
    deltas = {name: noise(seed) for seed, name in enumerate(weights)}
    with pytest.raises(UsageError, match=expected):
        bench.merged(deltas, {"method": method, **parameters}, weights=weights)
