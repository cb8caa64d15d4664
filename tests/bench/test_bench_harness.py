"""The instruments: order, statistics, ratios, memory, the report and the refusal to report on red tests."""

import gc
import json
import subprocess
import time
import types

import pytest
import torch

import bench.__main__ as cli
from bench import environment, harness, memory, report
from bench.harness import Floor, Peer, Row, Settings, Skip, Step, Workload

MIB = 2**20


@pytest.fixture(autouse=True)
def _keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def square(x, scale):
    return (scale * x).square().sum()


def family(**changes):
    """A family of one op, sum((s x)^2), with a peer of ours, a rival 5 ms slower and one that is missing."""

    def slow(x, scale):
        end = time.process_time() + 0.005
        while time.process_time() < end:
            pass
        return square(x, scale)

    def inputs(workload):
        x = torch.arange(1.0, workload.shape[0] + 1, dtype=workload.torch_dtype, requires_grad=True)
        return x, torch.nn.Parameter(torch.tensor(2.0))

    def truth(workload, tensors):
        x, scale = (t.detach().double() for t in tensors)
        return {"y": (scale * x).square().sum(), "d_x": 2 * scale**2 * x, "d_scale": 2 * scale * x.square().sum()}

    members = {
        "NAME": "toy",
        "TESTS": "tests/toy.py",
        "OPS": ("toy",),
        "DTYPES": ("float32",),
        "SHAPES": ((4096,),),
        "QUICK_SHAPES": ((1024,),),
        "inputs": inputs,
        "truth": truth,
        "peers": lambda workload, quick=False: [
            Peer("ours", lambda w: square, ours=True, floor="copy"),
            Peer("rival", lambda w: slow, floor="copy"),
            Peer("absent", lambda w: square, skip="not installed"),
        ],
        "floors": lambda workload: [Floor("copy", harness.copy_floor(size * MIB), f"{size} MiB") for size in (9, 1)],
        "extras": lambda settings, device: iter(()),
        "targets": lambda rows: [report.Target("faster", rows[0].ratio_to["rival"], ">=", 1.5)],
    }
    return types.SimpleNamespace(**{**members, **changes})


def row(peer, seconds, ours=False, **values):
    return Row.of("time", "toy", Workload("toy", (4,)), Peer(peer, lambda w: square, ours), min_s=seconds, **values)


# Timing


def test_peers_take_turns():
    calls = []
    runners = {name: lambda name=name: calls.append(name) for name in "ABC"}
    samples = harness.interleave(runners, settings=Settings(repeats=3), warmup=1)
    assert "".join(calls) == "ABC" * 4
    assert {name: len(values) for name, values in samples.items()} == {"A": 3, "B": 3, "C": 3}


def test_block_makes_longer_turns():
    calls = []
    runners = {name: lambda name=name: calls.append(name) for name in "AB"}
    samples = harness.interleave(runners, settings=Settings(repeats=2), warmup=0, block=3)
    assert "".join(calls) == "AAABBB" * 2
    assert len(samples["A"]) == 6


def test_samples_belong_to_their_peer():
    clock = iter(range(100))
    samples = harness.interleave({"A": lambda: 0, "B": lambda: 0}, lambda call: next(clock), Settings(3), warmup=0)
    assert samples == {"A": [0, 2, 4], "B": [1, 3, 5]}


def test_budget_ends_the_rounds_but_never_below_the_minimum(monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(now))

    def rounds(budget):
        settings = Settings(budget_s=budget, min_rounds=3, max_rounds=50)
        return len(harness.interleave({"A": lambda: 0}, lambda call: 1.0, settings)["A"])

    assert rounds(0) == 3
    assert 3 < rounds(100) < 50


def test_collector_is_off_while_measuring_and_back_on_after_an_error():
    seen = []
    harness.interleave({"A": lambda: seen.append(gc.isenabled())}, settings=Settings(repeats=1), warmup=0)
    assert seen == [False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        harness.interleave({"A": lambda: 1 / 0}, settings=Settings(repeats=1), warmup=0)
    assert gc.isenabled()


def test_minimum_median_and_spread():
    found = harness.summarise([5.0, 1.0, 3.0, 2.0, 100.0])
    assert found == {"min_s": 1.0, "median_s": 3.0, "spread_s": 3.0, "repeats": 5}
    assert harness.summarise([2.0]) == {"min_s": 2.0, "median_s": 2.0, "spread_s": 0.0, "repeats": 1}


def test_cpu_time_does_not_count_sleep():
    assert harness.cpu_time(lambda: time.sleep(0.05)) < 0.04
    assert harness.wall_time(lambda: time.sleep(0.05)) >= 0.05


def test_clock_follows_threads():
    assert harness.clock_for(Workload("toy", (1,)))[0] == "cpu"
    assert harness.clock_for(Workload("toy", (1,), threads=2))[0] == "wall"


# Ratios


def test_ratio_is_to_the_fastest_row_that_is_not_ours():
    rows = [row("ours fast", 1.0, True), row("ours slow", 1.5, True), row("rival", 4.0), row("strongest", 3.0)]
    harness.compare(rows)
    assert [r.ratio_to_strongest for r in rows] == [3.0, 2.0, 0.75, 1.0]
    assert {r.strongest_peer for r in rows} == {"strongest"}
    assert rows[0].ratio_to == {"ours slow": 1.5, "rival": 4.0, "strongest": 3.0}


def test_no_ratio_without_rivals():
    rows = [row("ours", 1.0, True)]
    harness.compare(rows)
    assert rows[0].ratio_to_strongest is None and rows[0].ratio_to == {}


# One step


def test_gradients_do_not_accumulate():
    x = torch.ones(3, requires_grad=True)
    step = Step(lambda x: x.square().sum(), (x,))
    first, second = step()[1][0], step()[1][0]
    assert torch.equal(first, torch.full((3,), 2.0)) and torch.equal(first, second)
    assert x.grad is None


def test_step_feeds_the_same_gradient_to_every_peer_of_a_tensor_valued_op():
    x = torch.randn(5, requires_grad=True)
    grads = [Step(lambda x: 3 * x, (x,))()[1][0] for _ in range(2)]
    assert torch.equal(*grads) and grads[0].std() > 0


def test_error_is_relative_to_the_truth():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert harness.relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)


def test_missing_gradient_is_not_passed_over():
    with pytest.raises(ValueError, match="returned 1 tensors"):
        harness.errors(((torch.ones(()),), ()), {"loss": torch.ones(()), "d_x": torch.ones(())})


def test_group_measures_peers_and_names_the_missing():
    rows, skips = harness.measure_group(family(), Workload("toy", (4096,)), Settings(repeats=5))
    ours, rival = rows
    assert [r.peer for r in rows] == ["ours", "rival"] and skips == [
        Skip("toy 4096 float32 cpu, 1 thread", "absent", "not installed")
    ]
    assert ours.ratio_to["rival"] == pytest.approx(rival.min_s / ours.min_s) and ours.ratio_to["rival"] > 2
    assert ours.percent_of_floor == pytest.approx(100 * ours.floor_s / ours.min_s)
    assert ours.floor_s == ours.floor_by["1 MiB"] < ours.floor_by["9 MiB"]
    assert ours.clock == "cpu" and ours.repeats == 5 and ours.min_s <= ours.median_s
    assert set(ours.error) == {"y", "d_x", "d_scale"} and max(ours.error.values()) < 1e-6
    assert ours.saved_bytes >= 4096 * 4


def test_broken_peer_is_reported_and_the_others_measured():
    def broken(x, scale):
        raise RuntimeError("no kernel\nfor this")

    members = [Peer("ours", lambda w: broken, ours=True), Peer("rival", lambda w: square)]
    toy = family(peers=lambda workload, quick=False: members)
    rows, skips = harness.measure_group(toy, Workload("toy", (16,)), Settings(repeats=1))
    assert [r.peer for r in rows] == ["rival"]
    assert skips[0].failed and skips[0].ours and skips[0].reason == "RuntimeError: no kernel"


def test_file_of_a_package_loads_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "fragile").mkdir()
    (tmp_path / "fragile" / "__init__.py").write_text("raise ImportError('needs the moon')")
    (tmp_path / "fragile" / "loss.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    assert harness.load_installed_file("fragile", "loss.py").answer == 42
    with pytest.raises(ModuleNotFoundError, match="no missing.py"):
        harness.load_installed_file("fragile", "missing.py")
    with pytest.raises(ModuleNotFoundError, match="not installed"):
        harness.load_installed_file("no_such_package", "loss.py")


# Memory


def test_meter_sees_fifty_megabytes():
    size = 50 * MIB
    rise = memory.peak_rise(lambda: torch.ones(size, dtype=torch.uint8))
    if rise is None:
        pytest.skip("this kernel does not reset VmHWM")
    # the kernel counts resident pages in batches per processor, so a reading may lag by a few hundred KiB
    assert size - MIB // 2 <= rise < size + 8 * MIB


def test_meter_does_not_carry_an_earlier_peak_over():
    if memory.peak_rise(lambda: torch.ones(80 * MIB, dtype=torch.uint8)) is None:
        pytest.skip("this kernel does not reset VmHWM")
    assert memory.peak_rise(lambda: torch.ones(20 * MIB, dtype=torch.uint8)) < 28 * MIB


def test_saved_bytes_count_each_storage_once():
    x = torch.ones(1000, requires_grad=True)
    y = torch.ones(1000, requires_grad=True)
    assert memory.saved_bytes(lambda: x * x) == 4000
    assert memory.saved_bytes(lambda: x[:500] * y[500:]) == 8000
    assert memory.saved_bytes(lambda: x + y) == 0


def test_fresh_process_measures_and_reports_failure():
    workload = Workload("info_nce", (1500, 16))
    peak = memory.fresh_process_peak("info_nce", workload, "naive log-sum-exp")
    assert peak is not None and 2 * 4 * 1500**2 < peak < 10 * 4 * 1500**2
    with pytest.raises(RuntimeError, match="no such peer"):
        memory.fresh_process_peak("info_nce", workload, "a peer nobody wrote")


# The gate


def test_green_needs_a_test_that_passed(tmp_path):
    files = {"good": "def test_a(): pass", "bad": "def test_a(): assert 0\ndef test_b(): pass", "none": "x = 1"}
    files["skipped"] = "import pytest\ndef test_a(): pytest.skip('no')"
    for name, text in files.items():
        (tmp_path / f"test_{name}.py").write_text(text)

    def status(name):
        return environment.run_tests(f"test_{name}.py", tmp_path).status

    assert status("good") == "green"
    assert [status(name) for name in ("bad", "none", "skipped")] == ["red"] * 3
    assert environment.run_tests("test_good.py test_bad.py", tmp_path).status == "red"
    assert environment.run_tests("test_good.py test_absent.py", tmp_path).status == "missing"
    missing = environment.run_tests("test_absent.py", tmp_path)
    assert missing.status == "missing" and "WARNING" in missing.text and missing.may_report


@pytest.fixture
def toy_cli(monkeypatch, tmp_path):
    """Runs the command line on the toy family; returns its status and the folder of results."""

    def run(*argv, status="green", **changes):
        monkeypatch.setattr(cli, "load", lambda name: family(**changes))
        monkeypatch.setattr(cli.environment, "run_tests", lambda path: environment.Gate(status, f"{path}: {status}"))
        return cli.main(["info_nce", "--repeats", "2", "--threads", "1", "--out", str(tmp_path), *argv]), tmp_path

    return run


def test_red_tests_print_no_speed(toy_cli, capsys):
    status, folder = toy_cli(status="red")
    out = capsys.readouterr()
    assert status == 1 and out.out == "" and "red" in out.err and not list(folder.iterdir())


def test_untested_figures_say_so(toy_cli, capsys):
    status, folder = toy_cli("--no-tests", status="red")
    assert status == 0 and "WARNING: not run" in capsys.readouterr().out
    assert json.loads((folder / "info_nce.json").read_text())["environment"]["tests"] == "not run"


def test_missing_op_of_ours_fails_the_command(toy_cli):
    absent = [Peer("ours", lambda w: square, ours=True, skip="not built"), Peer("rival", lambda w: square)]
    assert toy_cli(peers=lambda workload, quick=False: absent, targets=lambda rows: [])[0] == 1


def test_ops_chooses_among_those_of_the_family(toy_cli):
    _, folder = toy_cli("--ops", "squares", OPS=("other", "squares"))
    assert {row["op"] for row in json.loads((folder / "info_nce.json").read_text())["rows"]} == {"squares"}


# The report


def test_json_holds_rows_environment_and_targets(toy_cli, capsys):
    status, folder = toy_cli()
    assert status == 0
    data = json.loads((folder / "info_nce.json").read_text())
    assert set(data) == {"schema", "family", "environment", "rows", "skipped", "targets"}
    assert data["environment"]["tests"] == "green" and data["environment"]["versions"]["torch"] == torch.__version__
    first = data["rows"][0]
    kinds = {"kind": str, "device": str, "dtype": str, "shape": list, "threads": int, "commit": str, "cpu": str}
    kinds |= {"min_s": float, "median_s": float, "repeats": int, "percent_of_floor": float, "ratio_to": dict}
    kinds |= {"ratio_to_strongest": float, "saved_bytes": int, "error": dict, "isa": str, "versions": dict}
    assert {name: type(first[name]) for name in kinds} == kinds
    assert first["shape"] == [4096] and first["peer"] == "ours" and first["ours"] is True
    assert data["skipped"][0]["reason"] == "not installed"
    assert data["targets"][0]["met"] is True
    printed = capsys.readouterr().out
    assert printed.strip() == (folder / "info_nce.md").read_text().strip()
    assert "**ours**" in printed and "absent: not installed" in printed and "| yes" in printed
    assert (folder / "info_nce.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "value, bound, verdict",
    [(1.2, "<=", "yes"), (1.21, "<=", "no"), (1.2, ">=", "yes"), (1.19, ">=", "no"), (None, "<=", "not measured")],
)
def test_verdicts(value, bound, verdict):
    assert report.Target("figure", value, bound, 1.2).verdict == verdict


def test_figure_without_a_target_has_no_verdict():
    assert report.Target("figure", 1.0, "<=", None).verdict == "-"


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "-"),
        (0, "0"),
        (1.0, "1.00"),
        (0.012345, "0.0123"),
        (12.345, "12.3"),
        (123456.0, "123456"),
        (0.9996, "1.00"),
    ],
)
def test_numbers_have_three_figures(value, text):
    assert report.number(value) == text


def test_commit_is_marked_dirty(tmp_path):
    def git(*args):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *args], check=True, capture_output=True)

    assert environment.commit(tmp_path) == "unknown"
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    clean = environment.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("x")
    assert environment.commit(tmp_path) == clean + "+dirty"


# The command line


@pytest.mark.parametrize(
    "argv",
    [[], ["nothing"], ["info_nce", "--shapes", "12"], ["info_nce", "--shapes", "0x4"], ["info_nce", "--dtype", "int8"],
     ["info_nce", "--ops", "nothing"]]
    + [["info_nce", "--threads", "0"], ["info_nce", "--repeats", "0"], ["info_nce", "--device", "tpu"]],
)
def test_bad_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_list_names_families_and_peers(capsys):
    assert cli.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("info_nce:") and "naive log-sum-exp" in out and "open_clip ClipLoss" in out
