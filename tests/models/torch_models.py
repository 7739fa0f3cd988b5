"""The video and audio encoders in PyTorch, with the module names of their sources, to load checkpoints that we export.

The blocks follow showlab/EgoVLP `model/video_transformer.py` and YuanGongND/ast `src/models/ast_models.py` in what they
compute and in the names of their parameters. `test_golden_parity.py` compares them with the originals' own outputs.
"""

import torch
from torch import nn


def attention(qkv: torch.Tensor, allowed: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Returns softmax attention [b, n, w] over tokens' queries, keys and values [b, n, 3 w], masked by `allowed` [n, n]."""
    b, n, _ = qkv.shape
    query, key, value = qkv.reshape(b, n, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    out = logits.masked_fill(~allowed, float("-inf")).softmax(-1) @ value
    return out.transpose(1, 2).reshape(b, n, -1)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.qkv, self.proj, self.num_heads = nn.Linear(width, 3 * width), nn.Linear(width, width), num_heads

    def forward(self, x, allowed):
        return self.proj(attention(self.qkv(x), allowed, self.num_heads))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """A ViT block; with `time` it is EgoVLP's block, whose residual connection skips the time attention."""

    def __init__(self, width: int, num_heads: int, *, time: bool):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(width, num_heads), Mlp(width)
        if time:
            self.timeattn, self.norm3 = Attention(width, num_heads), nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, over_space, over_time=None):
        hint = self.timeattn(self.norm3(x), over_time) if over_time is not None else 0
        x = x + self.attn(self.norm1(x + hint), over_space)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, channels: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 16, stride)


class VisionTransformer(nn.Module):
    """The modules of timm's ViT: those of EgoVLP's video model if `num_frames` is above 0, otherwise those of AST's `v`."""

    def __init__(self, width, depth, num_heads, num_patches, *, num_frames=0, channels=3, stride=16, num_classes=0):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = PatchEmbed(width, channels, stride)
        self.blocks = nn.ModuleList(Block(width, num_heads, time=num_frames > 0) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + (1 if num_frames else 2), width))
        if num_frames:
            self.temporal_embed = nn.Parameter(torch.zeros(1, num_frames, width))
        else:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
            self.head, self.head_dist = nn.Linear(width, num_classes), nn.Linear(width, num_classes)


class VideoModel(VisionTransformer):
    def forward(self, video):
        """Returns the final class token [b, w] of clips [b, t, 3, h, w]."""
        b, t = video.shape[:2]
        patches = self.patch_embed.proj(video.flatten(0, 1)).flatten(2).transpose(1, 2)
        n = patches.shape[1]
        patches = patches.reshape(b, t, n, -1) + self.pos_embed[:, None, 1:] + self.temporal_embed[:, :t, None]
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(b, -1, -1), patches.flatten(1, 2)], 1)
        frame, place = torch.arange(t).repeat_interleave(n), torch.arange(n).repeat(t)
        over_space, over_time = (nn.functional.pad(g[:, None] == g, (1, 0, 1, 0), value=True) for g in (frame, place))
        for block in self.blocks:
            x = block(x, over_space, over_time)
        return self.norm(x)[:, 0]


class AudioModel(nn.Module):
    """The modules of AST: the encoder `v` and the head `mlp_head`."""

    def __init__(self, width, depth, num_heads, num_patches, label_dim, num_classes=1000):
        super().__init__()
        self.v = VisionTransformer(
            width, depth, num_heads, num_patches, channels=1, stride=10, num_classes=num_classes
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, label_dim))

    def features(self, spectrogram):
        """Returns the mean [b, w] of the class and distillation tokens of spectrograms [b, time, mel]."""
        v = self.v
        patches = v.patch_embed.proj(spectrogram.transpose(1, 2)[:, None]).flatten(2).transpose(1, 2)
        tokens = torch.cat([v.cls_token, v.dist_token], 1).expand(len(patches), -1, -1)
        x = torch.cat([tokens, patches], 1) + v.pos_embed
        everything = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        for block in v.blocks:
            x = block(x, everything)
        return v.norm(x)[:, :2].mean(1)

    def forward(self, spectrogram):
        return self.mlp_head(self.features(spectrogram))


class FrozenInTime(nn.Module):
    """EgoVLP's model with action2sound's audio model, under their parameter names; `text_model` is Hugging Face's."""

    def __init__(self, video_model: nn.Module, text_model: nn.Module, audio_model: nn.Module | None, embed_dim: int):
        super().__init__()
        width = video_model.cls_token.shape[-1]
        self.video_model, self.text_model = video_model, text_model
        if audio_model is not None:
            self.audio_model = audio_model
        self.vid_proj = nn.Sequential(nn.Linear(width, embed_dim))
        self.txt_proj = nn.Sequential(nn.ReLU(), nn.Linear(text_model.config.hidden_size, embed_dim))
