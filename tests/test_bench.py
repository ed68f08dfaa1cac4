"""make bench-gpu, rehearsed on a CPU: every preset's network makes a training step. Times are not looked at."""

from tests.bench import gpu


def test_every_preset_makes_a_step(tmp_path, capsys):
    report = gpu.main(["--dry", "--preset", "tiny", "--out", str(tmp_path / "r.json")])
    assert report["rehearsal"] and report["steps"].keys() == gpu.STEPS.keys() and len(report["steps"]) == 5
    assert not [step for step in report["steps"].values() if "error" in step or step["learned"] < 1000]
    text = capsys.readouterr().out
    assert "no figure counts" in text and " ms a step" not in text and (tmp_path / "r.json").is_file()
