"""The check that is kept ready for a GPU runs here on a CPU, and sees faults."""

import json

import pytest

from bench.table import Row
from tools import gpu_check

ON_CPU = ["--device", "cpu", "--dtypes", "float32", "bfloat16"]


def test_every_check_holds_and_is_written(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    options = ["--families", "llama", "mamba", "--shape", "none", "--out", str(out)]
    assert gpu_check.main([*ON_CPU, *options]) == 0
    written = json.loads(out.read_text())
    checks = {(c["model"], c["dtype"], c["what"]): c for c in written["checks"]}
    assert len(checks) == 2 * 2 * len(gpu_check.WAYS) + len(gpu_check.OTHERS)
    made = [c for c in checks.values() if c["passed"]]
    assert all(0 <= c["measured"] <= c["limit"] for c in made)
    assert len(made) >= 2 * 2 * len(gpu_check.WAYS)
    lacking = checks["llama", "float32", "smaller packs"]
    assert (lacking["passed"], lacking["note"]) == (None, "not made: needs a GPU")
    assert written["rows"] == []
    assert written["versions"]["torch"] and written["date"] and written["gpu"] is None
    assert str(tmp_path) not in out.read_text() and "0 failed" in capsys.readouterr().out


FEW = [*ON_CPU[:3], "float32", "--families", "qwen2", "--shape", "none"]


@pytest.mark.parametrize("what", ["states", "soft tokens"])
def test_wrong_states_fail_and_the_rest_is_still_checked(what, monkeypatch, tmp_path):
    def off(model, queries, prompts, **options):
        found = gpu_check_states(model, queries, prompts, **options)
        wrong = ("soft" in prompts) == (what == "soft tokens")
        found.states[3] += 0.01 * wrong
        return found

    gpu_check_states = gpu_check.hidden_states
    monkeypatch.setattr(gpu_check, "hidden_states", off)
    assert gpu_check.main([*FEW, "--out", str(tmp_path / "out.json")]) == 1
    checks = json.loads((tmp_path / "out.json").read_text())["checks"]
    assert [c["what"] for c in checks if c["passed"] is False] == [what]
    assert len(checks) == len(gpu_check.WAYS) + len(gpu_check.OTHERS)


def test_a_check_that_raises_fails_with_its_message(monkeypatch, tmp_path):
    def broken(subject):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setitem(gpu_check.WAYS, "DRO", broken)
    assert gpu_check.main([*FEW, "--out", str(tmp_path / "out.json")]) == 1
    checks = json.loads((tmp_path / "out.json").read_text())["checks"]
    (failed,) = [c for c in checks if c["passed"] is False]
    assert failed["note"].startswith("RuntimeError: CUDA error: an illegal memory access")


def test_the_bench_follows_and_its_difference_counts(monkeypatch, tmp_path):
    asked = []

    def gpu_rows(like, shape, device):
        asked.append((like.name, shape, device))
        yield Row("GPU capture", shape, [], [1.0], equal=False)

    monkeypatch.setattr(gpu_check, "gpu_rows", gpu_rows)
    monkeypatch.setattr(gpu_check, "checks", lambda *arguments: iter(()))
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path / "out.json")]) == 1
    assert asked == [("organism", "7b", "cpu")]
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["equal"] is False


def test_without_a_gpu_it_says_what_to_give(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    assert "no GPU at hand: give --device cpu" in capsys.readouterr().out
