"""EasyOcc's claims on a tiny world, by the method's own command line: every arm learns its terms, nothing runs twice."""

import json
import sys

import commands
import numpy as np
import pytest
import torch

import easyocc as E
from common.files import InputError
from common.geometry import OCC3D
from common.labelers import make_labeler, write_maps
from common.labels import WORLD
from common.networks import occnerf as N
from common.nuscenes import FREE, open_split
from common.report.occupancy import spread
from experiments import easyocc as X

run, fails = commands.of(E)
SMALL = ["--map-stride", "8", "8", "--grid-stride", "4", "4", "2", "--lift-stride", "1", "1", "1", "--cnn-channels", "8",
         "16", "--channels", "8", "--image-size", "56", "100", "--workers", "1", "--warmup", "1"]
CFG = E.Config(backbone="conv", channels=8, cnn3d="unet", cnn_channels=(8, 16), grid_stride=(4, 4, 2), norm="group",
               logit_norm=False)  # fmt: skip


@pytest.fixture
def flags(tiny_world, tmp_path):
    return ["--data-root", tiny_world, "--cache", tmp_path / "cache", "--steps", "1", *SMALL]


def test_claims_share_arms_and_go_on_from_what_is_there(flags, tmp_path, capsys):
    for claim in ("streamlined", "e"):
        run("ablate", "--claim", claim, "--seeds", "1", *flags, "--out", tmp_path / "claims" / claim)
    said = capsys.readouterr().out
    assert "constant predictor" in said and said.count("step 000001/1") == 4  # `3D labels` is the easyocc of (b)
    (row,) = json.loads((tmp_path / "claims" / "e" / "verdict.json").read_text())["comparisons"]
    assert row["seeds"] == [0] and "both arms below the constant predictor" in row["verdict"]
    logs = [json.loads(path.read_text().splitlines()[-1]) for path in (tmp_path / "claims").rglob("log.jsonl")]
    terms = sorted(" ".join(sorted(set(log) - {"step", "loss", "lr", "ms", "data", "gb"})) for log in logs)
    assert terms == ["ce dist ent lov photo scal sem smooth", "ce lov scal", "depth dist ent sem", "dist ent photo sem smooth"]
    assert all(np.isfinite(log["loss"]) for log in logs)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "claims").rglob("result.json")}
    run("ablate", "--claim", "streamlined", "--seeds", "1", *flags, "--out", tmp_path / "claims" / "streamlined")
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_label_quality_table(flags, tmp_path, capsys):
    run("ablate", "--claim", "label-quality", *flags, "--out", tmp_path / "q")
    rows = json.loads((tmp_path / "q" / "label_quality.json").read_text())["rows"]
    assert len(rows) == 8 and all(0 < row["precision camera"] < 1 for row in rows.values())
    assert "13 past, movers kept" in capsys.readouterr().out


def test_claims_run_in_one_process(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("os._exit", sys.exit)  # as a rank ends
    assert "start it without torchrun" in fails(capsys, "ablate", "--claim", "time")


def test_an_unknown_claim_costs_one_line(capsys):
    assert f"one of {', '.join(X.CLAIMS)}, label-quality" in fails(capsys, "ablate", "--claim", "magic")


def test_the_pure_host_opens_no_label_and_weighs_classes_by_their_pixels(tiny_world, tmp_path):
    dataset = open_split(tiny_world, None, None, (56, 100), tmp_path / "cache")
    labeler = make_labeler("world", dataset, **WORLD)
    for i in range(len(dataset)):
        write_maps(tmp_path / "maps", dataset.camera_files(i), labeler(i))
    frames = X.RayFrames(dataset, tmp_path, CFG)
    item = frames(0, np.random.default_rng(0))
    assert item["target"].numel() == 0
    pixels = torch.cat([frames.on_rays(frames.maps(i))[0].flatten() for i in range(len(dataset))])
    road, sky = ((pixels == c).sum() for c in (11, FREE))
    assert sky > 0 and item["ray_weight"][FREE] / item["ray_weight"][11] == pytest.approx((road / sky) ** 0.5)
    with pytest.raises(InputError, match="no label of this keyframe"):
        X.RayFrames(dataset, tmp_path, CFG, pseudo=True).target(0)


@pytest.mark.parametrize("ratio", [0.8, 1.0])
def test_the_host_answers_on_the_box_whatever_its_cells(ratio):
    net = X.Host(CFG, pretrained=False, ratio=ratio)
    cells, centers, unit = net.lifted_cells(CFG)
    assert cells == ((62, 62, 10) if ratio < 1 else (50, 50, 8)) and len(centers) == np.prod(cells)
    assert torch.allclose(N.contract(centers, net.grid, ratio), unit, atol=1e-4)
    assert net.classify.bias[FREE] == X.START
    # Logits that are a coordinate of the contracted cell are read back at the grid's centres.
    x = torch.linspace(-1 + 1 / cells[0], 1 - 1 / cells[0], cells[0]).view(1, 1, -1, 1, 1).expand(1, 1, *cells)
    grid = OCC3D.coarsen((4, 4, 2))
    expected = N.contract(grid.centers(dtype=torch.float32), grid, ratio)[..., 0]
    assert torch.allclose(X.on_grid(x, grid, ratio)[0, 0], expected, atol=1e-3)


def test_rendered_depth_is_compared_in_log_where_the_map_has_one(monkeypatch):
    """Of two rays, the one without a depth in its map does not count: |log 2 - log 4| = log 2."""
    out = N.Rendered(torch.tensor([2.0, 5.0]), torch.zeros(2, 18), torch.full((2, 3), 1 / 3), torch.rand(2, 3),
                     torch.full((2,), 0.5), torch.full((2,), 60.0))  # fmt: skip
    for name in ("camera_rays", "ray_depths"):
        monkeypatch.setattr(N, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(N, "render", lambda *args: out)
    frame = {"ray_K": None, "ray_T": None, "ray_seed": 0, "ray_semantic": torch.tensor([4, 255]),
             "ray_depth": torch.tensor([4.0, 0.0]), "ray_weight": torch.ones(18)}  # fmt: skip
    losses = X.rendered_losses(torch.zeros(18, 2, 2, 2), frame, CFG, OCC3D, 1.0, ("sem", "depth"))
    assert losses["depth"].item() == pytest.approx(np.log(2))


def test_coarse_images_have_a_slope_from_afar():
    """A textured wall at 10 m, seen again 1 m further left: at 30 m fine images alone find no way to it."""
    K, eye = torch.tensor([[[100.0, 0, 100], [0, 100, 56], [0, 0, 1]]]), torch.eye(4)[None]
    noise = torch.rand(1, 3, 112, 240, generator=torch.Generator().manual_seed(0))
    wall = 0.5 * noise + 0.5 * torch.nn.functional.interpolate(
        torch.nn.functional.interpolate(noise, (7, 15), mode="area"), (112, 240), mode="bilinear")
    moved = eye.clone()
    moved[0, 0, 3] = 1.0  # 10 px at 10 m
    others = [(wall[..., 30:230], moved, torch.ones(1, dtype=torch.bool))]
    error = {d: X.photometric(wall[..., 20:220], torch.full((1, 112, 200), d), K, eye, others) for d in (10.0, 14.0, 30.0)}
    assert error[10.0] < 0.5 * error[14.0] and error[14.0] < error[30.0]


def test_a_host_is_read_where_its_occupancy_fits_best_in_training(tiny_world, tmp_path):
    """Log odds of -2.75 in matter and -3.4 in the air: the best of -6, -5.5 ... 3 is -3."""
    dataset, truth = open_split(tiny_world, None, None, (56, 100), tmp_path / "cache"), []

    class Told(torch.nn.Module):
        position = torch.zeros(1)

        def forward(self, batch):
            matter = torch.from_numpy(truth.pop(0) != FREE)
            free = np.log(17) + torch.where(matter, 2.75, 3.4)
            return torch.cat([torch.zeros(17, *OCC3D.shape), free[None]])[None]

    truth += [dataset.labels(i)[0] for i in spread(len(dataset), 10)]
    assert X.calibrate(Told(), dataset) == -3.0 and not truth
