"""Layouts: every source is recognised, read completely, exported bit for bit, and computes what the original computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mc3_jax import checkpoint, model as model_lib, weights
from mc3_jax.models import checkpoint_files, layouts
from mc3_jax.models.audio import PreNormBlock
from mc3_jax.models.text import PostNormBlock
from mc3_jax.models.video import SpaceTimeBlock
from tests import golden_models

GOLDEN = golden_models.GOLDEN
SMALL = dict(num_hidden_layers=2, hidden_size=24, num_attention_heads=3, intermediate_size=96)


def random_weights(model):
    """Returns a PyTorch model with every weight drawn at random, also those that start at 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def distilbert(kind=transformers.DistilBertModel):
    return random_weights(
        kind(
            transformers.DistilBertConfig(
                vocab_size=40, max_position_embeddings=12, dim=24, n_layers=2, n_heads=3, hidden_dim=48
            )
        )
    )


def ast(kind=transformers.ASTModel):
    return random_weights(kind(transformers.ASTConfig(**SMALL, max_length=60, num_mel_bins=64, layer_norm_eps=1e-6)))


def vit(kind=transformers.ViTModel):
    return random_weights(kind(transformers.ViTConfig(**SMALL, image_size=64, layer_norm_eps=1e-6)))


def config():
    """Returns the config of the three models above."""
    return golden_models.model_config(
        audio__num_mel=64, audio__num_time_frames=60, audio__width=24, audio__num_heads=3, video__width=24,
        video__num_heads=3, text__vocab_size=40, text__num_positions=12, text__width=24, text__num_heads=3,
        text__mlp_width=48,
    )  # fmt: skip


def encode(tower, params, sizes, x, *rest):
    """Returns the features of an encoder with flat parameters, before the projection."""
    module = getattr(model_lib.make_model(sizes), f"{tower}_tower")
    own = {
        name.removeprefix(f"{tower}/encoder/"): value
        for name, value in params.items()
        if name.startswith(f"{tower}/encoder/")
    }
    return jax.jit(module.apply)({"params": checkpoint.unflatten(own)}, jnp.asarray(x), *map(jnp.asarray, rest))


@pytest.mark.parametrize(
    ("file", "towers"),
    [
        ("egovlp_tiny.pth", {"video": ("egovlp", "head"), "text": ("hf", "head")}),
        ("egovlp_config.pth", {"video": ("egovlp", "head"), "text": ("hf", "head")}),
        ("ast_tiny_148.pth", {"audio": ("timm", "head")}),
        ("deit_tiny.pth", {"image": ("timm", "")}),
    ],
)
def test_the_golden_files_are_recognised_by_their_names(file, towers):
    found = layouts.recognize(checkpoint_files.read_tensors(GOLDEN / file), file)
    assert {tower: (source.encoder, source.head) for tower, source in found.items()} == towers


def test_an_exported_tower_is_the_imported_one_bit_for_bit():
    for file in ("egovlp_tiny.pth", "ast_tiny_148.pth"):
        for tower, source in layouts.recognize(checkpoint_files.read_tensors(GOLDEN / file), file).items():
            back = layouts.to_theirs(layouts.to_ours(source, tower, file), tower, source.encoder, source.head)
            unread = {name for name in source.tensors if name.startswith(("head.", "head_dist."))}
            assert set(back) == set(source.tensors) - unread
            for name, value in back.items():
                np.testing.assert_array_equal(value, source.tensors[name], err_msg=name)


@pytest.mark.parametrize("model", [distilbert, ast])
def test_exported_hugging_face_weights_are_the_imported_ones_bit_for_bit(model, tmp_path):
    model().save_pretrained(tmp_path)
    tensors = checkpoint_files.read_tensors(tmp_path)
    ((tower, source),) = layouts.recognize(tensors, "x").items()
    back = layouts.to_theirs(layouts.to_ours(source, tower, "x"), tower, "hf")
    assert set(back) == set(tensors)
    for name, value in back.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def save(model, folder, how):
    """Saves a Hugging Face model as safetensors, or as models were saved years ago: `.bin`, with `position_ids`."""
    model.save_pretrained(folder)
    if how == "bin with position_ids":
        tensors = {n: torch.from_numpy(np.array(v)) for n, v in checkpoint_files.read_tensors(folder).items()}
        prefix = "distilbert." if any(name.startswith("distilbert.") for name in tensors) else ""
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(12)[None]
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize("how", ["safetensors", "bin with position_ids"])
@pytest.mark.parametrize("kind", [transformers.DistilBertModel, transformers.DistilBertForMaskedLM])
def test_distilbert_of_hugging_face_computes_the_same_here(kind, how, tmp_path):
    model = distilbert(kind)
    save(model, tmp_path, how)
    params, _ = weights.read_towers({"text": str(tmp_path)}, config())
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 40, (3, 10)), np.arange(10) < np.array([[10], [4], [7]])
    inner = getattr(model, "distilbert", model)
    with torch.no_grad():
        expected = inner(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))).last_hidden_state.numpy()
    hidden = encode("text", params, config(), ids.astype(np.int32), mask.astype(np.int32))
    np.testing.assert_allclose(np.asarray(hidden)[mask], expected[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [transformers.ASTModel, transformers.ASTForAudioClassification])
def test_ast_of_hugging_face_computes_the_same_here(kind, tmp_path):
    model = ast(kind)
    model.save_pretrained(tmp_path)
    params, notes = weights.read_towers({"audio": str(tmp_path)}, config())
    spectrogram = np.random.default_rng(0).normal(size=(2, 60, 64)).astype(np.float32)
    inner = getattr(model, "audio_spectrogram_transformer", model)
    with torch.no_grad():
        expected = inner(torch.from_numpy(spectrogram)).last_hidden_state[:, :2].mean(1).numpy()
    features = encode("audio", params, config(), spectrogram)
    np.testing.assert_allclose(features, expected, atol=1e-4, rtol=1e-4)
    assert "newly initialised: norm, projection" in notes[0]
    assert ("head of 2 outputs is skipped" in notes[0]) == (kind is transformers.ASTForAudioClassification)


def test_an_image_model_in_the_video_tower_sees_a_still_as_it_saw_the_image(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path)
    sizes = config()
    params, notes = weights.read_towers({"video": str(tmp_path)}, sizes)
    assert "newly initialised: projection, time attention" in notes[0]
    full = weights.complete(params, sizes, seed=0)  # the time attention is zero and adds nothing
    image = np.random.default_rng(0).normal(size=(2, 1, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(image[:, 0]).permute(0, 3, 1, 2)).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(encode("video", full, sizes, image), expected, atol=1e-4, rtol=1e-4)


def test_a_plain_vit_in_the_audio_tower_gets_a_second_token_and_a_summed_kernel(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path)
    params, notes = weights.read_towers({"audio": str(tmp_path)}, config())
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    np.testing.assert_array_equal(params["audio/encoder/distillation_token"], params["audio/encoder/class_token"])
    position = params["audio/encoder/position_embedding"]
    np.testing.assert_array_equal(position[:2], np.repeat(state["embeddings.position_embeddings"][0, :1], 2, axis=0))
    kernel = state["embeddings.patch_embeddings.projection.weight"].sum(axis=1).reshape(24, 256).T
    np.testing.assert_allclose(params["audio/encoder/patch_embedding/kernel"], kernel, atol=1e-6)
    for words in ("summed over RGB", "distillation token copied", "4x4 cut or stretched to 5x5"):
        assert words in notes[0]


def test_a_distilled_deit_in_the_video_tower_leaves_its_second_token_behind():
    sizes = golden_models.model_config()
    tensors = checkpoint_files.read_tensors(GOLDEN / "deit_tiny.pth")
    params, notes = weights.read_towers({"video": str(GOLDEN / "deit_tiny.pth")}, sizes)
    np.testing.assert_array_equal(params["video/encoder/position_embedding"][0], tensors["pos_embed"][0, 0])
    np.testing.assert_array_equal(params["video/encoder/class_token"], tensors["cls_token"][0, 0])
    assert "24x24 interpolated to 4x4" in notes[0]


def test_wrappers_prefixes_are_taken_off():
    tensors = checkpoint_files.read_tensors(GOLDEN / "ast_tiny_148.pth")
    for prefix in ("", "module.", "_orig_mod.module."):
        renamed = {prefix + name.removeprefix("module."): value for name, value in tensors.items()}
        assert list(layouts.recognize(renamed, "x")) == ["audio"]


def test_a_missing_an_unexpected_and_a_misshapen_tensor_are_listed_in_one_error():
    tensors = checkpoint_files.read_tensors(GOLDEN / "egovlp_tiny.pth")
    del tensors["module.video_model.blocks.1.timeattn.proj.bias"]
    tensors["module.video_model.blocks.1.gate"] = np.zeros(3, np.float32)
    source = layouts.recognize(tensors, "x.pth")["video"]
    with pytest.raises(ValueError, match=r"x.pth .* video tower .*- blocks.1.timeattn.proj.bias; \+ blocks.1.gate \[3\]"):
        layouts.to_ours(source, "video", "x.pth")
    path = str(GOLDEN / "egovlp_tiny.pth")
    with pytest.raises(ValueError, match=r"! encoder/word_embedding/embedding \[120, 48\], the model needs \[99, 48\]"):
        weights.read_towers({"text": path}, golden_models.model_config(text__vocab_size=99))
    with pytest.raises(ValueError, match=r"video tower.*\+ encoder/block_1"):
        weights.read_towers({"video": path}, golden_models.model_config(video__depth=1))
    with pytest.raises(ValueError, match=r"video tower.*- encoder/block_2"):
        weights.read_towers({"video": path}, golden_models.model_config(video__depth=3))


def deit(**changes):
    """Returns the golden DeiT's tensors with `changes`: `__` in a name stands for a dot, and None removes a tensor."""
    tensors = layouts._strip(checkpoint_files.read_tensors(GOLDEN / "deit_tiny.pth"))
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (deit(patch_embed__proj__bias=np.zeros((2, 48), np.float32)), r"! patch_embed.proj.bias float32 \[2, 48\]"),
        (deit(pos_embed=np.zeros((2, 578, 48), np.float32)), r"! pos_embed float32 \[2, 578, 48\]"),
        (deit(cls_token=np.zeros((2, 48), np.float32)), r"! cls_token float32 \[2, 48\]"),
        (deit(norm__weight=np.zeros((), np.float32)), r"! norm.weight float32 \[\]"),
        (deit(norm__weight=np.ones(48, np.int8)), r"! norm.weight int8 \[48\]"),
        (deit(pos_embed=None), "- pos_embed"),
        (deit(pos_embed=np.zeros((1, 1, 48), np.float32)), "x.pth: .* positions"),
        # As in AudioMAE: timm's names, but patches of a spectrogram's single channel.
        (deit(patch_embed__proj__weight=np.zeros((48, 1, 16, 16), np.float32)), r"\[48, 1, 16, 16\] is not for RGB"),
        (deit(patch_embed__proj__weight=np.zeros(48, np.float32)), r"\[48\] is not for RGB"),
    ],
)
@pytest.mark.parametrize("tower", ["audio", "video"])
def test_malformed_tensors_are_named_with_their_shapes(tensors, message, tower, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "read_tensors", lambda path: tensors)
    with pytest.raises(ValueError, match=message):
        weights.read_towers({tower: "x.pth"}, golden_models.model_config())


def test_a_block_of_an_absurd_number_is_one_unexpected_name():
    tensors = deit(blocks__100000__norm1__weight=np.zeros(48, np.float32))
    with pytest.raises(ValueError, match=r"\+ blocks.100000.norm1.weight \[48\]"):
        layouts.to_ours(layouts.recognize(tensors, "x")["image"], "audio", "x")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_summed_and_fitted_in_float32(dtype, monkeypatch):
    half = {name: value.astype(jnp.dtype(dtype)) for name, value in deit().items()}
    found = []
    for tensors in (half, {name: value.astype(np.float32) for name, value in half.items()}):
        monkeypatch.setattr(checkpoint_files, "read_tensors", lambda path, tensors=tensors: tensors)
        found.append(weights.read_towers({"audio": "x"}, golden_models.model_config(audio__num_time_frames=1024))[0])
    for name, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][name], err_msg=name)


def test_unknown_names_and_missing_towers_are_refused():
    with pytest.raises(ValueError, match="x: not a checkpoint of EgoVLP.*it holds layer1.weight"):
        layouts.recognize({"layer1.weight": np.zeros(2)}, "x")
    with pytest.raises(ValueError, match="EgoVLP's layout, but surprise belong"):
        layouts.recognize({"video_model.cls_token": np.zeros(2), "surprise": np.zeros(2)}, "x")
    with pytest.raises(ValueError, match="holds video and text, no audio tower"):
        weights.read_towers({"audio": str(GOLDEN / "egovlp_tiny.pth")}, golden_models.model_config())
    with pytest.raises(ValueError, match="holds audio, no text tower"):
        weights.read_towers({"text": str(GOLDEN / "ast_tiny_148.pth")}, golden_models.model_config())


def relative_error(found, expected):
    return np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("name", ["distilbert", "ast", "vit"])
def test_each_block_is_hugging_faces(name, tmp_path):
    """Every block gets the original's input, so that the error of one block does not hide in the next."""
    model = {"distilbert": distilbert, "ast": ast, "vit": vit}[name]()
    model.save_pretrained(tmp_path)
    tower = {"distilbert": "text", "ast": "audio", "vit": "video"}[name]
    flat, _ = weights.read_towers({tower: str(tmp_path)}, config())
    params = checkpoint.unflatten(weights.complete(flat, config(), seed=0))[tower]["encoder"]
    rng = np.random.default_rng(1)
    mask = np.arange(10) < np.array([[10], [6]])
    inputs = {
        "distilbert": {"input_ids": torch.from_numpy(rng.integers(0, 40, (2, 10))), "attention_mask": torch.tensor(mask)},
        "ast": {"input_values": torch.from_numpy(rng.normal(size=(2, 60, 64)).astype(np.float32))},
        "vit": {"pixel_values": torch.from_numpy(rng.normal(size=(2, 3, 64, 64)).astype(np.float32))},
    }[name]
    with torch.no_grad():
        hidden = [h.numpy() for h in model(**inputs, output_hidden_states=True).hidden_states]
    for i in range(2):
        own, x, expected = {"params": params[f"block_{i}"]}, jnp.asarray(hidden[i]), hidden[i + 1]
        if name == "distilbert":
            found = PostNormBlock(num_heads=3, mlp_width=48).apply(own, x, jnp.asarray(mask))
            found, expected = np.asarray(found)[mask], expected[mask]
        elif name == "ast":
            found = PreNormBlock(num_heads=3).apply(own, x)
        else:
            tokens = (x[:, :1], x[:, None, 1:])  # one frame: the time attention, still zero, adds nothing
            found = np.concatenate([np.asarray(part).reshape(2, -1, 24) for part in SpaceTimeBlock(3).apply(own, tokens)], 1)
        assert relative_error(found, expected) < 1e-5, f"block {i}"
