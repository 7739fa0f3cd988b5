"""The world rendered in memory equals the converted one; rows at the accelerator's sizes are those of the suite."""

import argparse
import copy
import json

import numpy as np
import pytest

from benchmarks import rendered_world, table_pages, tables, tables_in_memory
from mc3_jax.data import loader, transforms
from mc3_jax.evals import metrics


@pytest.mark.slow  # renders and converts
def test_rendered_clips_are_those_of_the_conversion(data):
    world = rendered_world.render(8, seed=0, short_side_px=112, num_workers=2, video_s=30.0)
    for split in ("train", "validation", "test"):
        source = loader.ClipSource(data / "clips", split)
        converted = [source[i] for i in range(len(source))]
        clips = world[split]
        # The conversion skips a row or two: repetitions of a moment and text, or clips at the very end of a video.
        by_text = {(clip.narration, clip.label): clip for clip in converted}
        common = [i for i in range(len(clips)) if (clips.texts[i], clips.label[i]) in by_text]
        assert len(common) >= 0.9 * len(converted)
        assert abs(len(clips) - len(converted)) <= 0.1 * len(converted)
        assert sum(clips.video_clips) == len(clips)
        alike, differences = [], []
        for i in common[:12]:
            clip = by_text[clips.texts[i], clips.label[i]]
            alike.append(np.corrcoef(clips.audio[i].astype(float), clip.audio.astype(float))[0, 1])
            middles = transforms.choose_frames(4, source.info.num_candidates, None)
            decoded = np.zeros((len(middles), *source.info.canvas_px, 3), np.uint8)
            size = transforms.decode_frames([clip.frames[j] for j in middles], decoded, clip.clip_id)
            ours = clips.video[i, transforms.choose_frames(4, rendered_world.NUM_CANDIDATES, None)]
            ours = ours[:, : clips.video_size[i, 0], : clips.video_size[i, 1]].mean(axis=(1, 2))
            differences.append(np.abs(ours - decoded[:, : size[0], : size[1]].mean(axis=(1, 2))).max())
        # Texts are repeated, so a clip may be compared with another one of the same text; most are compared with themselves.
        assert np.median(alike) > 0.95
        assert np.median(differences) < 4
    labelled = world["test"].label
    assert set(labelled) == {0, 1}
    assert set(world["train"].label) == {-1}


@pytest.mark.parametrize("row", tables.ROWS, ids=lambda row: row.file)
def test_a_row_keeps_its_loss_and_the_budget_at_another_size(row):
    setting = {axis: choices[-1] for axis, choices in tables.AXES.items()}
    config = tables_in_memory.row_config(row, setting, model=tables_in_memory.MODEL, epochs=24, batch_size=256)
    base = tables.base_config("soundworld", row)
    assert [phase.pairs for phase in config.phases] == [phase.pairs for phase in base.phases]
    if config.phases:
        assert sum(phase.epochs for phase in config.phases) == pytest.approx(24)
    for phase, own in zip(config.phases, base.phases, strict=True):
        assert phase.memory.pool_size / 256 == own.memory.pool_size / base.data.batch_size
    assert config.model.video.image_size_px == 112


def small_model():
    model = copy.deepcopy(tables_in_memory.MODEL)
    for tower in (model.audio, model.video, model.text):
        tower.width, tower.depth, tower.num_heads = 16, 1, 2
    model.text.mlp_width, model.embed_dim, model.video.image_size_px, model.video.resize_px = 32, 8, 32, 34
    model.text.vocab_size = 300
    return model


@pytest.mark.large  # most of a minute
def test_rows_are_trained_and_evaluated_and_their_tables_are_made_of_json_alone(tmp_path, monkeypatch):
    args = argparse.Namespace(
        rows="random,cm_acc,mc3", seed=0, out=tmp_path, videos=6, world_seed=3, short_side=48, num_workers=2, sweep=None
    )
    tables_in_memory.run(args, small_model(), 3, 16)
    rows = {name: json.loads((tmp_path / "runs" / name / "seed-0" / "results.json").read_text())
            for name in ("random", "cm_acc", "mc3")}  # fmt: skip
    labels = np.array(rows["mc3"]["clips"]["label"])
    for results in rows.values():
        assert results["clips"]["label"] == labels.tolist()
        scores = np.array(results["clips"]["av"])
        assert results["discovery"]["av"]["roc_auc"] == pytest.approx(metrics.roc_auc(labels, scores), abs=1e-4)
    assert rows["random"]["clips"]["av"] != rows["mc3"]["clips"]["av"] != rows["cm_acc"]["clips"]["av"]
    assert {"consensus", "contrastive"} < set(rows["mc3"]["last_step"])
    assert "consensus" not in rows["cm_acc"]["last_step"]
    table = table_pages.write(tmp_path, [("random", "Random", ("av",)), ("mc3", "MC3", ("av", "al"))], [0])
    assert "| MC3 |" in table
    assert "Regions of Fig. 2" in table
    monkeypatch.setattr(rendered_world, "render", None)  # nothing is rendered if no row is missing
    tables_in_memory.run(args, small_model(), 3, 16)
    with pytest.raises(ValueError, match="was run with epochs = 3, not 4: remove it, or name another --out"):
        tables_in_memory.run(args, small_model(), 4, 16)
    args.sweep = tmp_path / "sweep.json"
    args.sweep.write_text(json.dumps({"mc3": {"chosen": {"temperature": 0.2}}}))
    with pytest.raises(ValueError, match=r"mc3.* was run with setting = {}, not {'temperature': 0.2}"):
        tables_in_memory.run(args, small_model(), 3, 16)
