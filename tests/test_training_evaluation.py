"""Scores during training: what they leave alone, what they leave behind, and what is remembered of them."""

import json
import math
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from fork_server import TORCHRUN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_evaluation import RANDOM
from test_evaluation import run as evaluate  # noqa: F401 (a fixture)
from test_training import TINY, assert_same

from imaginaire_spade.build import build_losses, check_run
from imaginaire_spade.config_files import load_config
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import ConfigError, DataError
from imaginaire_spade.evaluation.report import differences, load_report
from imaginaire_spade.pretrained.feature_networks import FeatureNetwork
from imaginaire_spade.training import checkpoint, loop
from imaginaire_spade.training.setup import prepare

SCORES = "trainer.evaluation={every_images: 8, num_images: 7, metrics: [fid, kid], inception_weights: 'random:0',\
 feature_dim: 64}"
RARELY = ("trainer.image_every=100", "trainer.checkpoint_every=100", "trainer.log_every=100", "trainer.image_rows=0",
          "trainer.max_iterations=4")  # fmt: skip


@pytest.fixture
def tiny_run(tiny_folder, tmp_path, monkeypatch):
    """(config file, function that trains it in this process and gives its checkpoint)."""
    tree = json.loads(json.dumps(TINY))
    tree["data"]["train"]["roots"] = [str(tiny_folder(size=(40, 80), keys=10))]
    tree["data"]["val"] = {"roots": [str(tiny_folder("val", size=(40, 80), keys=9, seed=1))], "batch_size": 2,
                           "augmentations": {"resize_h_w": [32, 64]}}  # fmt: skip
    monkeypatch.setattr("imaginaire_spade.training.run_log.write_curves", lambda *_: None)  # they take longer
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))

    def run(logdir: str, *overrides: str, stop_after: int | None = None) -> dict:
        config = load_config(path, [*RARELY, *overrides])
        check_run(config, 1)
        made = prepare(config, build_losses(config), ProcessInfo(), torch.device("cpu"), stop_after)
        loop.train(made, tmp_path / logdir, None)
        return checkpoint.load_checkpoint(checkpoint.newest_checkpoint(tmp_path / logdir))

    return path, run


def scores_of(logdir) -> list[dict]:
    if not (logdir / "metrics.jsonl").exists():
        return []
    records = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in record.items() if k == "iteration" or k.startswith("evaluation/")}
        for record in records
        if any(key.startswith("evaluation/") for key in record)
    ]


def test_scores_change_nothing_and_are_kept_with_the_best(tiny_run, tmp_path, capsys):
    _, run = tiny_run
    plain = run("plain")
    capsys.readouterr()
    scored = run("scored", SCORES)
    printed = capsys.readouterr().out
    assert_same({k: v for k, v in scored.items() if k != "evaluation"}, plain)
    assert scored["evaluation"]["evaluated_at"] == 16

    logdir = tmp_path / "scored"
    found = scores_of(logdir)
    assert [record["iteration"] for record in found] == [2, 4]  # 8 images are two iterations
    name = "evaluation/random_feature_distance"
    assert set(found[0]) == {"iteration", name, "evaluation/random_feature_mmd"}
    events = EventAccumulator(str(logdir)).Reload()
    assert [event.step for event in events.Scalars(name)] == [8, 16]  # images, as in the names of files
    np.testing.assert_allclose([event.value for event in events.Scalars(name)], [r[name] for r in found], rtol=1e-6)

    best = min(found, key=lambda record: record[name])
    assert scored["evaluation"]["best"] == (best[name], 4 * best["iteration"])
    kept = checkpoint.load_checkpoint(logdir / "checkpoints/best.pt")
    assert kept["images_seen"] == 4 * best["iteration"] == kept["evaluation"]["evaluated_at"]
    assert printed.count("the best random_feature_distance so far: checkpoints/best.pt") >= 1
    report = json.loads((logdir / "evaluation/scores_000000000016.json").read_text())
    assert report["scores"]["random_feature_distance"] == found[1][name]
    assert report["protocol"]["num_real"] == report["protocol"]["num_fake"] == 7
    assert any("untrained network" in warning for warning in report["warnings"])


def test_scores_go_on_where_they_were(tiny_run, tmp_path, capsys, monkeypatch):
    _, run = tiny_run
    straight = run("straight", SCORES)
    run("broken", SCORES, stop_after=2)
    reference = (tmp_path / "broken/evaluation/real.npz").read_bytes()
    capsys.readouterr()

    # A process that is asked to leave in the midst of an evaluation does so at once; it is done when the run goes on,
    # here although nothing but the evaluation is left to do.
    measure, calls = FeatureNetwork.__call__, []

    def leave(self, pictures):
        calls.append(len(pictures))
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, pictures)

    monkeypatch.setattr(FeatureNetwork, "__call__", leave)
    with pytest.raises(SystemExit) as left:
        run("broken", SCORES)
    assert left.value.code == 143 and calls == [2]
    monkeypatch.undo()
    assert [record["iteration"] for record in scores_of(tmp_path / "broken")] == [2]
    printed = capsys.readouterr().out
    assert "so far is" in printed and "real photos from" in printed and "leaving on SIGTERM" in printed

    assert_same(run("broken", SCORES), straight)
    assert scores_of(tmp_path / "broken") == scores_of(tmp_path / "straight")
    assert (tmp_path / "broken/evaluation/real.npz").read_bytes() == reference  # computed once
    a, b = (checkpoint.load_checkpoint(tmp_path / name / "checkpoints/best.pt") for name in ("straight", "broken"))
    assert a["evaluation"] == b["evaluation"]

    # Another protocol: nothing to compare with. A damaged reference: computed anew.
    (tmp_path / "broken/evaluation/real.npz").write_bytes(reference[:100])
    capsys.readouterr()
    run("broken", SCORES.replace("random:0", "random:1"), "trainer.evaluation.best=kid", "trainer.max_iterations=5")
    printed = capsys.readouterr().out
    assert "the protocol changed (network, score), so the best score is reset" in printed
    assert "statistics of 7 real photos computed" in printed


@pytest.fixture
def scores_to_come(monkeypatch):
    """Evaluations that give these scores, one after the other."""
    values = []

    def next_score(*_, **__):
        scores = {"random_feature_distance": values.pop(0), "random_feature_mmd": 0.0}
        return SimpleNamespace(scores=scores, save=lambda path: None)

    monkeypatch.setattr("imaginaire_spade.training.evaluation.evaluate", next_score)
    return values


def test_a_run_without_better_scores_ends_early(tiny_run, tmp_path, scores_to_come, capsys):
    _, run = tiny_run
    often = (SCORES.replace("every_images: 8", "every_images: 4, patience: 3"), "trainer.max_iterations=9")
    scores = [5.0, 4.0, 4.5, math.nan, 4.0, 1.0]
    scores_to_come += scores
    straight = run("straight", *often)
    assert straight["images_seen"] == 20 and scores_to_come == [1.0]
    told = (
        "3 evaluation(s) in a row did not improve random_feature_distance (trainer.evaluation.patience: 3); the best is"
        " 4, at 8 images: checkpoints/best.pt"
    )
    assert f"ending the run early: {told}" in capsys.readouterr().out

    # The count survives a restart.
    scores_to_come[:] = scores
    run("broken", *often, stop_after=3)
    broken = run("broken", *often)
    assert_same(broken, straight)
    assert broken["evaluation"] == straight["evaluation"] and scores_to_come == [1.0]
    # The same command again does nothing; more patience goes on.
    capsys.readouterr()
    assert run("broken", *often)["images_seen"] == 20
    assert f"finished: iteration 5 of 9: {told}. To go on, raise trainer.evaluation.patience" in capsys.readouterr().out
    scores_to_come += [2.0, 2.0, 2.0]
    assert run("broken", *often, "trainer.evaluation.patience=4")["evaluation"]["best"] == (1.0, 24)


def test_evaluate_finds_the_scores_of_training(tiny_run, tmp_path, evaluate):  # noqa: F811
    _, run = tiny_run
    run("log", SCORES.replace("num_images: 7", "num_images: null"), "gen.style_dims=4")
    best = checkpoint.load_checkpoint(tmp_path / "log/checkpoints/best.pt")
    name = f"scores_{best['images_seen']:012d}.json"
    then = load_report(tmp_path / "log/evaluation" / name)
    now = evaluate("--checkpoint", tmp_path / "log/checkpoints/best.pt", "--metrics", "fid,kid", *RANDOM)
    assert now.protocol == then.protocol and differences(now.protocol, then.protocol) == []
    photos = tmp_path / "log/evaluation/real.npz"  # serves evaluate.py too
    again = evaluate("--checkpoint", tmp_path / "log/checkpoints/best.pt", "--real", photos, *RANDOM)
    assert again.scores["random_feature_distance"] == pytest.approx(now.scores["random_feature_distance"], rel=1e-12)
    assert differences(again.protocol, now.protocol) == []
    for score, value in then.scores.items():
        assert now.scores[score] == pytest.approx(value, rel=1e-3, abs=1e-6)


def test_two_processes_find_the_scores_of_one(tiny_run, tmp_path, commands):
    path, run = tiny_run
    still = ("gen_opt={lr: 1.0e-12}", "dis_opt={lr: 1.0e-12}", "trainer.max_iterations=2",  # equal but for rounding
             "trainer.evaluation.metrics=[fid, kid, precision_recall]", "trainer.evaluation.best=recall")  # fmt: skip
    run("one", SCORES, *still)
    overrides = [f"--set={item}" for item in (*RARELY, SCORES, *still, "data.train.batch_size=2")]
    launcher = (*TORCHRUN, "--standalone", "--nproc_per_node=2")
    result = commands.run(
        *launcher, "train.py", "--config", path, "--logdir", tmp_path / "two", *overrides, NO_CURVES="1"
    )
    assert result.returncode == 0, result.stderr
    assert "ending the run early" not in result.stdout
    (one,), (two,) = scores_of(tmp_path / "one"), scores_of(tmp_path / "two")
    assert one.keys() == two.keys()
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=0.02)
    stored = [np.load(tmp_path / name / "evaluation/real.npz") for name in ("one", "two")]
    for name in ("count", "sum", "outer", "features"):
        np.testing.assert_allclose(stored[1][name], stored[0][name], rtol=1e-6)
    assert (tmp_path / "two/checkpoints/best.pt").is_file()

    # The next launch takes the statistics from the file, and finds that nothing gets better.
    overrides += ["--set=trainer.max_iterations=8", "--set=trainer.evaluation.patience=1"]
    result = commands.run(
        *launcher, "train.py", "--config", path, "--logdir", tmp_path / "two", *overrides, NO_CURVES="1"
    )
    assert result.returncode == 0 and "7 real photos from" in result.stdout, result.stderr
    assert "1 evaluation(s) in a row did not improve random_feature_recall" in result.stdout
    assert [record["iteration"] for record in scores_of(tmp_path / "two")] == [2, 4]


def test_a_damaged_validation_sample_is_named_at_the_start(tiny_run, tiny_folder, tmp_path):
    _, run = tiny_run
    damaged = sorted((tmp_path / "val/images").rglob("*.*"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(DataError, match=damaged.stem) as raised:
        run("log", SCORES.replace("num_images: 7", "num_images: null"))
    assert "skip_bad" not in str(raised.value)  # train.py has no such flag
    assert not scores_of(tmp_path / "log")


def test_a_segmenter_decides_too(tiny_run, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the package transformers (extra eval) is not installed")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_labels=5, hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
    )  # fmt: skip
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    transformers.SegformerImageProcessor(size={"height": 32, "width": 64}).save_pretrained(tmp_path / "model")
    _, run = tiny_run
    section = (
        f"trainer.evaluation={{every_images: 4, metrics: [segmentation], best: miou, segmenter: {tmp_path}/model}}"
    )
    for stop_after in (1, 2):  # the second start takes the real photos' matrix from the file
        run("log", section, "trainer.max_iterations=2", stop_after=stop_after)
    found = scores_of(tmp_path / "log")
    assert [record["iteration"] for record in found] == [1, 2]
    assert set(found[0]) >= {"evaluation/miou", "evaluation/miou_real", "evaluation/pixel_accuracy_real"}
    assert found[0]["evaluation/miou_real"] == found[1]["evaluation/miou_real"]
    report = json.loads((tmp_path / "log/evaluation/scores_000000000008.json").read_text())
    details = report["details"]["segmentation"]
    assert details["pixels"] + details["ignored_pixels"] == 9 * 32 * 64 and len(details["classes"]) == 5
    assert re.match("sha256 [0-9a-f]{64}, input", report["protocol"]["segmentation"])
    with pytest.raises(ConfigError, match=r"trainer\.evaluation\.segmenter: .*nowhere: not usable"):
        run("other", section.replace(f"{tmp_path}/model", f"{tmp_path}/nowhere"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((SCORES, "data.val=null"), r"there is no data\.val: write data\.val\.roots"),
        ((SCORES.replace("7", "70"),), "num_images: 70, but data.val has 9 samples"),
        ((SCORES.replace("random:0", "/nowhere.pth"),), r"/nowhere\.pth.*fetch http"),
        ((SCORES.replace("[fid, kid]", "[kid]"),), "best: fid is measured by fid, which metrics does not name"),
        ((SCORES.replace("[fid, kid]", "[fid, segmentation]"),), "segmenter: MODEL belong together"),
    ],
)
def test_what_is_missing_is_said_before_training(tiny_run, tmp_path, overrides, message):
    _, run = tiny_run
    with pytest.raises(ConfigError, match=message):
        run("log", *overrides)
    assert not (tmp_path / "log").exists()
