"""The benchmark's own arithmetic and book-keeping; the measuring itself needs a GPU."""

import json

import pytest
import torch

from bench import compare, figure, model, ncu_table, rows, run, stamp, tables
from bench.rivals import Implementation
from bench.shapes import LENGTH_SWEEP, SHAPES, STATE_SWEEP, Shape, over_ops
from mamba2_cuda._explain import floor_bytes, flops
from mamba2_cuda._load import load_ops

# Bytes per token at p 64, n 128, h 80, g 1, bf16, and FLOPs per token-head, counted by hand.
TOKEN_BYTES = {"fwd": 21_152, "bwd": 32_064}
HEAD_FLOPS = {"fwd": 41_165, "bwd": 98_918}


@pytest.mark.parametrize("op", ["fwd", "bwd"])
def test_floor_and_flops(op):
    shape = SHAPES["2.7b_b8_l4k"]
    tokens = shape.b * shape.l
    assert over_ops(floor_bytes, shape, op) == tokens * TOKEN_BYTES[op]
    assert over_ops(flops, shape, op) == pytest.approx(tokens * 80 * HEAD_FLOPS[op], rel=1e-4)


def test_train_is_forward_and_backward():
    shape = SHAPES["8b_g8_b4_l4k"]
    for function in (floor_bytes, flops):
        parts = [over_ops(function, shape, op) for op in ("fwd", "bwd")]
        assert over_ops(function, shape, "train") == sum(parts)


def row(impl="mamba2_cuda", op="ssd_fwd", ms=1.0, **more):
    base = {"op": op, "shape": "2.7b_b8_l4k", "dtype": "bf16", "impl": impl, "version": "1",
            "ms": ms, "gpu": "card", "torch": "2.11", "commit": "abc", "date": "d",
            "graph": False}  # fmt: skip
    return base | more


def test_ratios_compare_the_same_work():
    measured = [
        row(ms=0.5),
        row("mamba_ssm", ms=2.0),
        row("mamba_ssm", op="ssd_bwd", ms=9.0),
        row("mamba_ssm", ms=1.0, graph=True),
        row("sdpa_flash", op="attention_fwd", ms=5.0),
    ]
    ours = run.with_ratios(measured)[0]
    assert ours["ratios"] == {"mamba_ssm": 4.0, "sdpa_flash": 10.0}
    assert ours["ratio"] == 4.0
    assert "ratios" not in measured[1]


def test_rows_are_appended_and_remeasured(tmp_path):
    path = tmp_path / "results" / "h200.json"
    rows.add(path, [row(ms=1.0), row("mamba_ssm", ms=2.0)])
    rows.add(path, [row(ms=0.9), row(ms=0.8, commit="def")])
    kept = json.loads(path.read_text())
    assert [(r["impl"], r["ms"], r["commit"]) for r in kept] == [
        ("mamba2_cuda", 0.9, "abc"),
        ("mamba_ssm", 2.0, "abc"),
        ("mamba2_cuda", 0.8, "def"),
    ]
    assert len(rows.table(kept).splitlines()) == 4


STAMP = {"passed": 3, "failed": 0, "error": 0, "exit_status": 0, "summary": "3 passed", "gpu": "H"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"failed": 1}, "red"),
        ({"passed": 0}, "red"),
        ({"exit_status": 2}, "red"),
        ({"digest": "of other sources"}, "sources changed"),
        ({"gpu": ""}, "no GPU"),
    ],
)
def test_no_figures_from_red_tests(tmp_path, monkeypatch, change, reason):
    path = tmp_path / "tests.json"
    path.write_text(json.dumps({**STAMP, "digest": stamp.digest(), **change}))
    monkeypatch.setattr(stamp, "STAMP", path)
    monkeypatch.setattr(stamp, "COMMITTED", tmp_path / "absent.json")
    if reason is None:
        assert stamp.require_green(gpu=True)["passed"] == 3
    else:
        with pytest.raises(stamp.RedTests, match=reason):
            stamp.require_green(gpu=True)


def test_no_figures_without_tests(tmp_path, monkeypatch):
    monkeypatch.setattr(stamp, "STAMP", tmp_path / "absent.json")
    monkeypatch.setattr(stamp, "COMMITTED", tmp_path / "absent.json")
    with pytest.raises(stamp.RedTests, match="no test run is on record"):
        stamp.require_green(gpu=False)


def test_committed_stamp_counts(tmp_path, monkeypatch):
    committed = tmp_path / "committed.json"
    committed.write_text(json.dumps({**STAMP, "digest": stamp.digest()}))
    elsewhere = tmp_path / "tests.json"
    elsewhere.write_text(json.dumps({**STAMP, "digest": "older"}))
    monkeypatch.setattr(stamp, "STAMP", elsewhere)
    monkeypatch.setattr(stamp, "COMMITTED", committed)
    assert stamp.require_green(gpu=True)["gpu"] == "H"


NCU = """==PROF== Connected
"ID","Kernel Name","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",\
"launch__grid_size","smsp__average_warps_issue_stalled_wait_per_issue_active",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active"
"","","%","us","","inst","inst"
"0","void mamba2::ssd::(anonymous namespace)::chunk_state_kernel<64, true>(int)","61.5","1,250.5",\
"320","0.4","2.5"
""".replace("\\\n", "")


def test_ncu_report_is_read(tmp_path):
    (tmp_path / "ncu.csv").write_text(NCU)
    (kernel,) = ncu_table.parse(tmp_path / "ncu.csv")
    assert kernel["kernel"] == "chunk_state_kernel<64, true>"
    assert kernel["ms"] == pytest.approx(1.2505)
    assert (kernel["HBM %"], kernel["blocks"], kernel["regs"]) == (61.5, 320, None)
    assert kernel["stall"] == "long_scoreboard"
    assert ncu_table.markdown([kernel]).count("\n") == 2


class FakeCard:
    """What bench.run asks a card for, with times that follow from the problem."""

    MS = {"mamba2_cuda": 1.0, "mamba_ssm": 4.0, "sdpa_flash": 8.0, "sdpa_cudnn": 5.0}

    def __init__(self, monkeypatch, tmp_path):
        common = {
            "gpu": "H200",
            "torch": "2.11",
            "commit": "abcdef0123",
            "date": "d",
            "command": "c",
        }
        monkeypatch.setattr(run.command, "begin", lambda bench, options: common)
        monkeypatch.setattr(run, "implementations", self.implementations)
        monkeypatch.setattr(run.timing, "copy_bytes_per_second", lambda: 4e12)
        monkeypatch.setattr(run.timing, "median_ms", lambda call, budget_ms: call())
        monkeypatch.setattr(run, "calls", lambda made, shape, op: lambda: self.ms(made, shape, op))
        for name in ("get_device_name", "set_stream", "Stream"):
            monkeypatch.setattr(run.torch.cuda, name, lambda *a: "H200")
        monkeypatch.setattr(run.gc, "collect", lambda: 0)  # half a second each, after many tests
        monkeypatch.setattr("sys.argv", ["run", "--sweep", "--results", str(tmp_path)])

    def implementations(self, names, folder):
        kinds = {name: "attention" if name.startswith("sdpa") else "ssd" for name in names}
        return [Implementation(n, "1", kinds[n], None) for n in names], ["none"]

    def ms(self, made, shape, op):
        length = shape.l / 4096 if made.op == "attention" else 1.0
        return self.MS[made.name] * length * shape.n / 128 * {"fwd": 1, "bwd": 3}[op]


def test_sweep(monkeypatch, tmp_path, capsys):
    card = FakeCard(monkeypatch, tmp_path)
    run.main()
    measured = rows.load(tmp_path / "h200_sweep.json")
    lengths, states = len(LENGTH_SWEEP), len(STATE_SWEEP)
    assert len(measured) == lengths * 2 * len(card.MS) + states * 2  # attention has no state
    l64k = [r for r in measured if (r["shape"], r["op"]) == ("l65536", "ssd_bwd")]
    assert l64k[0]["ratios"] == {"mamba_ssm": 4.0, "sdpa_flash": 128.0, "sdpa_cudnn": 80.0}
    assert (tmp_path / "ssd_sweep.png").stat().st_size > 10_000

    forward, by_state = (figure.lines(measured, prefix, "fwd") for prefix in "ln")
    assert list(forward) == list(card.MS) and list(by_state) == ["mamba2_cuda", "mamba_ssm"]
    assert forward["sdpa_flash"] == [(shape.l, 8.0 * shape.l / 4096) for shape in LENGTH_SWEEP]
    assert by_state["mamba_ssm"] == [(shape.n, shape.n / 32) for shape in STATE_SWEEP]
    assert figure.lines(measured, "l", "bwd")["mamba2_cuda"][0] == (512, 3.0)


def test_a_models_rows_are_compared_with_the_same_work():
    measured = [
        row(op="generate", ms=1.0) | {"shape": "b1_fp32_state", "tokens_per_s": 256},
        row(op="generate", ms=0.5) | {"shape": "b1_bf16_state", "tokens_per_s": 512},
        row(op="train_step", ms=4.0) | {"peak_bytes": 3 * 10**9},
        row("mamba_ssm", op="generate", ms=2.0) | {"shape": "b1_bf16_state"},
        row("mamba_ssm", op="mixer_fwd", ms=9.0),
    ]
    compared = model.with_ratios(measured)
    assert [r.get("ratio") for r in compared] == [2.0, 4.0, None, None, None]
    lines = model.table(compared).splitlines()
    assert len(lines) == 6 and "512" in lines[2] and "3.00" in lines[3]


def test_one_failure_does_not_end_a_run(capsys):
    assert model.attempt("good", lambda: 3) == 3
    assert model.attempt("bad", lambda: 1 / 0) is None
    assert "bad failed: division by zero" in capsys.readouterr().out


def test_tables_say_what_the_rows_say():
    """README.md and docs; `python -m bench.tables` writes them anew."""
    stale = [path.name for path in tables.documents() if stale_blocks(path.read_text())]
    assert not stale
    assert sum(len(tables.BLOCK.findall(path.read_text())) for path in tables.documents()) >= 4


def stale_blocks(text):
    return tables.filled(text) != text


def test_tables_follow_the_newest_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    ratios = {"ratio": 4.0, "ratios": {"mamba_ssm": 4.0, "sdpa_flash": 9.0}}
    rows.add(
        tmp_path / "h200.json",
        [
            row(ms=0.5, **ratios),
            row("mamba_ssm", ms=2.0),
            row(op="ssd_bwd", ms=1.25, **ratios),
            row("mamba_ssm", op="ssd_bwd", ms=5.0),
            row(ms=0.25, commit="newer", **ratios),
            row("mamba_ssm", ms=1.0, version="2.3", commit="newer"),
            row(ms=0.1, commit="newest"),  # alone: no ratio
        ],
    )
    text = tables.filled("before\n<!-- rows: speed -->\nold\n<!-- end -->\nafter")
    assert "| 8, 4096, 80, 64, 1, 128 | 0.250 | 4.0x | 1.250 | 4.0x |" in text
    assert "card, torch 2.11, beside mamba_ssm 2.3, 1; commit newer, abc." in text
    assert (
        text.startswith("before\n") and text.endswith("<!-- end -->\nafter") and "old" not in text
    )
    assert not stale_blocks(text)
    full = tables.beside()
    assert "| 2.7b_b8_l4k | 0.250 (4.0) | 1.000 | 1.250 (4.0) | 5.000 |  |  |" in full
    assert tables.sweep() == "No figure is in bench/results yet."

    step = row(op="train_step", ms=40.0) | {"shape": "130m_b8_l2k", "tokens_per_s": 409600}
    rows.add(tmp_path / "h200_model.json", [step | {"peak_bytes": 12 * 10**9}])
    assert "| training step | 130m b8 l2k | 40.00 | 409,600 | 12.0 |  |" in tables.model()


@pytest.mark.parametrize("op", compare.OPS)
def test_builds_stand_side_by_side(tmp_path, op):
    """A copy of the library whose operators lie in a namespace of their own does the same."""
    other = compare.operators(load_ops(), 1 + compare.OPS.index(op), tmp_path)
    shape = Shape("small", 1, 70, 2, 16, 1, 16)
    calls = [compare.call_of(ops, shape, op, "cpu") for ops in (torch.ops.mamba2_cuda, other)]
    assert other.name != torch.ops.mamba2_cuda.name
    assert all(map(torch.equal, *(call() for call in calls)))


def test_builds_are_compared_with_the_first():
    assert compare.line([2.0, 1.9, 2.2], [True, True, False]) == (
        "2.0000 (+0.0%)  1.9000 (-5.0%)  2.2000 (+10.0%, other bits)"
    )
