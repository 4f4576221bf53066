"""The vision transformer of DINO (Caron et al., ICCV 2021) as an image encoder, with its published names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidr.shapes import Float

_PRETRAINED_SIDE = 224  # pixels; position embeddings are stored for this square


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Non-overlapping square patches, each projected to a token."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        return self.proj(images)


class VisionTransformer(nn.Module):
    """DINO's ViT: the normalised patch tokens of the last block as a feature map of stride `patch`.

    `stride` is pixels per cell of the output, `channels` its depth. Sides of an image must be multiples of
    the patch.
    """

    def __init__(self, patch: int, width: int, heads: int, depth: int = 12) -> None:
        super().__init__()
        self.stride = patch
        self.channels = width
        self.side = _PRETRAINED_SIDE // patch  # patches along one side of the stored position embeddings
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))
        self.patch_embed = PatchEmbed(patch, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for weight in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        patches = self.patch_embed(images)
        rows, columns = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.positions(rows, columns)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)[:, 1:]
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))

    def positions(self, rows: int, columns: int) -> Float[Tensor, "1 1+rows*columns C"]:
        """Position embeddings for a map of `rows` x `columns` patches, resized bicubically.

        The scale factors are ((rows + 0.1) / side, (columns + 0.1) / side), as DINO has them: the 0.1 keeps
        rounding from losing a row, and it shifts the samples a little, so it belongs to the numbers.
        """
        if rows == columns == self.side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))
        scale = ((rows + 0.1) / self.side, (columns + 0.1) / self.side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def vit_small(patch: int) -> VisionTransformer:
    """ViT-S: width 384, 6 heads, 12 blocks."""
    return VisionTransformer(patch, width=384, heads=6)


def vit_base(patch: int) -> VisionTransformer:
    """ViT-B: width 768, 12 heads, 12 blocks."""
    return VisionTransformer(patch, width=768, heads=12)
