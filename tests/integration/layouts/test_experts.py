"""Experts and sequences split over ranks: every layout computes what one rank does, and sends what
theory says.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import load_config
from engine.dispatch.message import RowFormat
from engine.kernels import experts_cpu
from engine.parallel import Layout
from tests.integration.cluster import ROOT, free_port
from tests.integration.layouts.experts_rank import STEPS, make_runner, passes, tokens_of
from tests.unit.engine.checkpoints import make_checkpoint

pytestmark = pytest.mark.timeout(240)  # the first test waits for the ranks to do all cases

WORLD = 4
MOE = "Qwen3MoeForCausalLM"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("Qwen3ForCausalLM", {"vocab_size": 211}),
    "moe": (MOE, {"vocab_size": 300}),
    # Every second layer is dense; experts do not divide evenly, one sits beside two.
    "odd": (MOE, {"num_experts": 5, "num_experts_per_tok": 3, "decoder_sparse_step": 2}),
    # All scores are equal: two experts get every token, the others none.
    "ties": (MOE, {}),
    # Shared experts, groups to choose from, and a cache of latents.
    "latent": ("DeepseekV3ForCausalLM", {"vocab_size": 260}),
}
DISPATCHERS = ("allgather", "alltoall", "padded")
SPLITS: list[dict[str, int]] = [
    {"ep": 1},
    {"tp": 2},
    {"tp": 2, "ep": 2},
    {"tp": 4, "ep": 2},
    {"tp": 4, "ep": 4},
    {"dp": 2},
    {"dp": 2, "ep": 2},
    {"dp": 2, "tp": 2},
    {"dp": 2, "tp": 2, "ep": 2},
    {"dp": 2, "tp": 2, "ep": 4},
    {"pp": 2, "tp": 2, "ep": 2},
    {"pp": 2, "dp": 2},
    {"pp": 2, "dp": 2, "ep": 2},
]
# Of 8 experts on 2 ep ranks: 0 and 5 are hot.
MOVED = {"0": [[7, 0], [3, 4], [1, 6], [2, 5]], "2": [[5, 2], [0, 7], [4, 3], [6, 1]]}
SWAPPED = {"1": [[4, 5, 6, 7], [0, 1, 2, 3]], "2": [[0, 5, 2, 7], [4, 1, 6, 3]]}
REPLICAS = {"1": [[0, 5, 1, 2, 3], [5, 4, 6, 7, 0]], "2": [[0, 1, 2, 3], [0, 4, 5, 6, 7]]}


def _name(model: str, dispatch: str, split: dict[str, int], extra: str = "") -> str:
    return " ".join([model, dispatch, *(f"{k}{v}" for k, v in split.items()), extra]).strip()


def _cases() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def add(model: str, dispatch: str, split: dict[str, int], extra: str = "", **more: Any) -> None:
        name = _name(model, dispatch, split, extra)
        found[name] = {**split, **more, "name": name, "model": model, "dispatch": dispatch}

    for split in SPLITS:
        if split.get("ep", 1) == 1:
            add("dense", "auto", split)
        for dispatch in DISPATCHERS:
            add("moe", dispatch, split)
    for dispatch in DISPATCHERS:
        add("odd", dispatch, {"dp": 2, "tp": 2, "ep": 4})
        add("ties", dispatch, {"dp": 2, "tp": 2, "ep": 4})
        for split in ({"tp": 2, "ep": 2}, {"dp": 2, "tp": 2, "ep": 2}):
            add("moe", dispatch, split, "replicas", maps=REPLICAS, experts=8)
        add("moe", dispatch, {"dp": 2, "tp": 2, "ep": 4}, "moved", maps=MOVED, experts=8)
        add("moe", dispatch, {"dp": 2, "tp": 2, "ep": 2}, "bf16", dtype="bfloat16")
        # From even places, each layer's in the middle of all sequences.
        more = {"moves": MOVED, "experts": 8}
        add("moe", dispatch, {"dp": 2, "tp": 2, "ep": 4}, "moving", **more)
        add("moe", dispatch, {"pp": 2, "dp": 2, "ep": 2}, "moving", moves=SWAPPED, experts=8)
        split = {"dp": 2, "tp": 2, "ep": 4}
        add("moe", dispatch, split, "bf16", dtype="bfloat16")
        add("moe", dispatch, split, "bf16 moving", dtype="bfloat16", **more)
    add("moe", "auto", {"dp": 2, "ep": 2})
    add("latent", "allgather", {"tp": 2})
    add("latent", "allgather", {"tp": 2, "ep": 2})
    add("latent", "padded", {"dp": 2, "ep": 2})
    add("latent", "alltoall", {"dp": 2, "tp": 2, "ep": 4})
    add("latent", "padded", {"pp": 2, "dp": 2, "ep": 2}, "moving", moves=SWAPPED, experts=8)
    return found


CASES = _cases()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {
        name: make_checkpoint(tmp_path_factory.mktemp(name), architecture, **sizes)
        for name, (architecture, sizes) in MODELS.items()
    }
    file = made["ties"] / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor.zero_()
    save_file(tensors, file, {"format": "pt"})
    return made


@pytest.fixture(scope="module")
def computed(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, computed by one group of ranks; by name and rank."""
    out = tmp_path_factory.mktemp("logits")
    cases = [{**case, "model": str(models[case["model"]])} for case in CASES.values()]
    (out / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.integration.layouts.experts_rank"]
    last = [str(WORLD), str(free_port()), str(out / "cases.json"), str(out)]
    ranks = [subprocess.Popen([*command, str(rank), *last], cwd=ROOT) for rank in range(WORLD)]
    try:
        assert [rank.wait(200) for rank in ranks] == [0] * WORLD
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return out


@pytest.fixture(scope="module")
def wanted(models: dict[str, Path]) -> Any:
    """One rank's logits for a dp rank's sequences."""

    @cache
    def of(model: str, dp_rank: int, dtype: str = "float32") -> Tensor:
        runner = make_runner(models[model], Layout(), dtype)
        steps = passes(dp_rank, runner.config.vocab_size)
        return torch.cat([runner.forward(chunks) for chunks in steps if chunks])

    return of


def _layout(case: dict[str, Any], rank: int) -> Layout:
    dp, pp, tp = (case.get(name, 1) for name in ("dp", "pp", "tp"))
    return Layout(
        dp=dp,
        pp=pp,
        tp=tp,
        ep=case.get("ep", 1),
        dp_rank=rank // (pp * tp),
        pp_rank=rank // tp % pp,
        tp_rank=rank % tp,
    )


def _layouts(case: dict[str, Any]) -> list[Layout]:
    return [_layout(case, rank) for rank in range(_layout(case, 0).ranks)]


FP32 = [name for name, case in CASES.items() if "dtype" not in case]


@pytest.mark.parametrize("name", FP32)
def test_logits_are_those_of_one_rank(name: str, wanted: Any, computed: Path) -> None:
    case = CASES[name]
    for layout in _layouts(case):
        found = load_file(computed / f"{name}.{layout.rank}")["logits"]
        one_rank = wanted(case["model"], layout.dp_rank)
        if layout.pp_rank == 0 and (layout.pp == 1 or layout.tp_rank == 0):
            torch.testing.assert_close(found, one_rank, atol=1e-5, rtol=1e-5)
        else:
            assert found.shape == (0, one_rank.shape[1])


SPARSE = [name for name in FP32 if CASES[name]["model"] != "dense"]


@pytest.mark.parametrize("name", SPARSE)
def test_every_token_is_counted_once_for_each_of_its_experts(
    name: str, models: dict[str, Path], computed: Path
) -> None:
    case = CASES[name]
    moe = load_config(models[case["model"]]).moe
    assert moe is not None
    loads: dict[str, Tensor] = {}
    for layout in _layouts(case):
        for key, load in load_file(computed / f"{name}.{layout.rank}").items():
            if key.startswith("loads."):
                loads[key] = loads.get(key, torch.zeros_like(load)) + load
    every = [passes(rank, 128)[step] for rank in range(case.get("dp", 1)) for step in range(STEPS)]
    assert loads.keys() == {f"loads.{layer}" for layer in range(3) if moe.is_sparse(layer)}
    for key, load in loads.items():
        # The last layer computes what comes after attention for the wanted rows only.
        rows = sum(map(len, every) if key == "loads.2" else map(tokens_of, every))
        assert load.sum() == moe.top_k * rows
        if case["model"] == "ties":
            assert sorted(load.tolist()) == [0] * 6 + [rows] * 2


@pytest.mark.parametrize("name", [name for name in SPARSE if CASES[name]["dispatch"] != "auto"])
def test_a_decode_step_sends_what_theory_says(
    name: str, models: dict[str, Path], computed: Path
) -> None:
    case = CASES[name]
    config = load_config(models[case["model"]])
    of_all = []
    for layout in _layouts(case):
        found = json.loads((computed / f"{name}.{layout.rank}.json").read_text())["counts"]
        of_all.append(found)
        rows = [len(passes(rank, 128)[3]) for rank in range(layout.dp)]
        assert config.moe is not None
        sparse = sum(config.moe.is_sparse(layer) for layer in layout.layers(config.num_layers))
        theory = _theory(layout, config, rows, sparse, case["dispatch"])
        if "maps" in case and case["dispatch"] == "padded":
            continue  # checked without: the width of the maps enters
        known = {kind: each for kind, each in found.items() if kind in theory}
        assert known == theory
        if case["dispatch"] != "alltoall":
            assert set(found) == set(theory)
    if case["dispatch"] == "alltoall":
        _check_packed(of_all, case, config)


def _theory(
    layout: Layout, config: Any, rows: list[int], sparse: int, dispatch: str
) -> dict[str, list[int]]:
    """Calls and bytes of a step with so many single tokens, in fp32, but for the packed way's."""
    D, V, K = config.hidden_size, config.vocab_size, config.moe.top_k
    own, tp = rows[layout.dp_rank], layout.tp
    part = layout.ragged_part(own)
    own_part = part.stop - part.start
    layers = len(layout.layers(config.num_layers))
    found: dict[str, list[int]] = {}
    # Without experts a layer has two all-reduces; a layer with experts has attention's, and that of
    # experts which all tokens go through.
    reduces = 2 * layers - (0 if config.moe.shared_size else sparse) + (layout.pp_rank == 0)
    if own:
        # Alone, nothing needs an embedding's sum.
        reduces -= tp == 1 and layout.pp_rank == 0
        found["all_reduce"] = [reduces, reduces * own * D * 4]
        if layout.pp_rank == layout.pp - 1:
            width = layout.ragged_part(V)
            found["all_gather"] = [1, own * (width.stop - width.start) * 4]
    room = -(-max(rows) // tp)
    if dispatch == "allgather" and layout.dp == 1:
        found["expert_all_reduce"] = [sparse, sparse * own * D * 4]
        return found
    if own:
        found["all_gather_rows"] = [sparse, sparse * own_part * D * 4]
    W = layout.expert_ranks
    if dispatch == "allgather":
        message = RowFormat(2 * K, D, torch.float32).row_bytes
        found["expert_all_gather"] = [sparse, sparse * room * message]
        found["expert_reduce_scatter"] = [sparse, sparse * (W - 1) * room * D * 4]
    elif dispatch == "padded":
        room = -(-(1 << (max(rows) - 1).bit_length()) // tp)
        most = min(K, -(-config.moe.num_experts // layout.ep))
        message = RowFormat(most, D, torch.float32).row_bytes
        each = (W - 1) * room * (message + most * D * 4)
        found["all_to_all"] = [2 * sparse, sparse * each]
    return {kind: each for kind, each in found.items() if each[0]}


def _check_packed(of_all: list[dict[str, list[int]]], case: dict[str, Any], config: Any) -> None:
    """Three calls a layer: counts, rows and outputs. No row goes twice to one rank."""
    row = RowFormat(config.moe.top_k, config.hidden_size, torch.float32).row_bytes
    stages: dict[int, list[tuple[Layout, list[int]]]] = {}
    for layout, found in zip(_layouts(case), of_all, strict=True):
        stages.setdefault(layout.pp_rank, []).append((layout, found["all_to_all"]))
    for ranks in stages.values():
        first = ranks[0][0]
        sparse = sum(map(config.moe.is_sparse, first.layers(config.num_layers)))
        assert [calls for _, (calls, _) in ranks] == [3 * sparse] * len(ranks)
        W = first.expert_ranks
        tokens = sum(len(passes(rank, 128)[3]) for rank in range(first.dp))
        counts = sparse * W * (W - 1) * 16
        pairs = tokens * config.moe.top_k * first.etp
        most = counts + sparse * (min(tokens * W, pairs) * row + pairs * config.hidden_size * 4)
        assert counts <= sum(size for _, (_, size) in ranks) <= most


def test_packed_rows_go_once_to_a_rank_with_several_of_their_experts(
    models: dict[str, Path], computed: Path
) -> None:
    name = _name("ties", "alltoall", {"dp": 2, "tp": 2, "ep": 4})
    config, layouts = load_config(models["ties"]), _layouts(CASES[name])
    loads = load_file(computed / f"{name}.0")["loads.0"]
    chosen = set(loads.nonzero().flatten().tolist())
    held = [len(chosen.intersection(each.expert_part(8))) for each in layouts]
    rows = [each.ragged_part(len(passes(each.dp_rank, 128)[3])) for each in layouts]
    tokens = [part.stop - part.start for part in rows]
    row_bytes = RowFormat(2, config.hidden_size, torch.float32).row_bytes
    for layout in layouts:
        rank = layout.expert_rank
        others = [each for each in range(4) if each != rank]
        there = tokens[rank] * sum(held[each] > 0 for each in others) * row_bytes
        back = held[rank] * sum(tokens[each] for each in others) * config.hidden_size * 4
        found = json.loads((computed / f"{name}.{layout.rank}.json").read_text())["counts"]
        assert found["all_to_all"] == [3 * 3, 3 * (3 * 16 + there + back)]


def test_measured_dispatchers_are_the_same_on_all_ranks(computed: Path) -> None:
    name = _name("moe", "auto", {"dp": 2, "ep": 2})
    reports = [json.loads((computed / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]
    tables = [report["table"] for report in reports]
    assert tables[0] == tables[1]
    assert list(tables[0]) == ["1", "2", "4"]
    assert set(tables[0].values()) <= set(DISPATCHERS)


@pytest.mark.parametrize("model", ["moe", "odd", "ties"])
def test_packed_and_padded_make_the_same_bits(model: str, computed: Path) -> None:
    split = {"dp": 2, "tp": 2, "ep": 4}
    packed, padded = (
        load_file(computed / f"{_name(model, each, split)}.0")["logits"]
        for each in ("alltoall", "padded")
    )
    assert torch.equal(packed, padded)


@pytest.mark.parametrize("dispatch", ["alltoall", "padded"])
def test_where_experts_are_changes_no_bit(dispatch: str, computed: Path) -> None:
    split = {"dp": 2, "tp": 2, "ep": 4}
    even, moved = (
        load_file(computed / f"{_name('moe', dispatch, split, extra)}.2")["logits"]
        for extra in ("", "moved")
    )
    assert torch.equal(even, moved)


@pytest.mark.parametrize("dispatch", ["alltoall", "padded"])
@pytest.mark.parametrize("dtype", ["", "bf16"])
def test_experts_that_move_in_mid_sequence_change_no_bit(
    dispatch: str, dtype: str, computed: Path
) -> None:
    split = {"dp": 2, "tp": 2, "ep": 4}
    if dtype and experts_cpu._native() is None:
        pytest.skip("torch's products may give a row other bits beside other rows")
    for dp_rank in (0, 1):
        still, moving = (
            load_file(computed / f"{_name('moe', dispatch, split, extra)}.{2 * dp_rank}")["logits"]
            for extra in (dtype, f"{dtype} moving".strip())
        )
        assert torch.equal(still, moving)


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_bf16_error_is_at_most_twice_that_of_one_rank(
    dispatch: str, wanted: Any, computed: Path
) -> None:
    truth = wanted("moe", 0)
    own = (wanted("moe", 0, "bfloat16") - truth).square().mean().sqrt()
    name = _name("moe", dispatch, {"dp": 2, "tp": 2, "ep": 2}, "bf16")
    found = load_file(computed / f"{name}.0")["logits"]
    assert (found - truth).square().mean().sqrt() <= 2 * own
