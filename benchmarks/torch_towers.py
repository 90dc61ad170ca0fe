"""The same two towers in PyTorch, for `step_torch.py` to train.

Two implementations of one model. "transformers" is that library's SwinModel and
CLIPTextModel, written by others. "plain" is written here in the layout of UniCL's
release, with one matmul for q, k and v and the shift's mask made once; it takes our
weights, so that the two losses can be compared. `step.py` reports the faster.

Letters: B batch, H x W tokens, C channels, w window, N = w^2, h heads, T texts.
"""

import torch
import torch.nn.functional as F
from torch import nn

from unicl_jax.encoders.swin import VARIANTS, relative_position_index, shift_mask


class WindowAttention(nn.Module):
    """Swin's: a learned bias for each relative position, a mask where shifted."""

    def __init__(self, width, heads, window, mask):
        super().__init__()
        self.heads = heads
        table = torch.empty((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(
            nn.init.trunc_normal_(table, std=0.02)
        )
        index = torch.from_numpy(relative_position_index(window))
        self.register_buffer("relative_position_index", index, persistent=False)
        mask = None if mask is None else torch.from_numpy(mask)[:, None]
        self.register_buffer("attn_mask", mask, persistent=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        """[B, windows, N, C] -> the same."""
        batch, windows, n, width = x.shape
        qkv = self.qkv(x).view(batch, windows, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.permute(2, 0, 1)
        if self.attn_mask is not None:
            bias = bias + self.attn_mask
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        y = logits.softmax(-1).to(v.dtype) @ v
        return self.proj(y.transpose(2, 3).reshape(batch, windows, n, width))


class Mlp(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, width, hidden, activation, names):
        super().__init__()
        self.activation, self.names = activation, names
        self.add_module(names[0], nn.Linear(width, hidden))
        self.add_module(names[1], nn.Linear(hidden, width))

    def forward(self, x):
        """[..., C] -> the same."""
        first, second = (getattr(self, name) for name in self.names)
        return second(self.activation(first(x)))


class SwinBlock(nn.Module):
    """(Shifted) window attention and an MLP."""

    def __init__(self, width, heads, window, resolution, shift, mlp_ratio):
        super().__init__()
        self.window, self.shift = window, shift
        mask = shift_mask(resolution, window, shift) if shift else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, mask)
        self.mlp = Mlp(width, int(width * mlp_ratio), F.gelu, ("fc1", "fc2"))

    def forward(self, x):
        """[B, H, W, C] -> the same."""
        batch, height, _, width = x.shape
        w, s, n = self.window, self.shift, height // self.window
        y = self.norm1(x)
        if s:
            y = y.roll((-s, -s), (1, 2))
        y = y.view(batch, n, w, n, w, width).transpose(2, 3)
        y = self.attn(y.reshape(batch, n * n, w * w, width))
        y = y.view(batch, n, n, w, w, width).transpose(2, 3)
        y = y.reshape(batch, height, height, width)
        if s:
            y = y.roll((s, s), (1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A p x p convolution of stride p, and a norm."""

    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        """[B, H, W, 3] -> [B, H/p, W/p, C]."""
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Half the resolution, twice the channels."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        """[B, H, W, C] -> [B, H/2, W/2, 2C]."""
        batch, height, _, width = x.shape
        x = x.view(batch, height // 2, 2, height // 2, 2, width)
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(batch, height // 2, height // 2, -1)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    """The image tower of `unicl_jax.encoders.swin`."""

    def __init__(
        self,
        embed_dim,
        depths,
        num_heads,
        image_size,
        window_size=7,
        patch_size=4,
        mlp_ratio=4.0,
        absolute_positions=False,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(embed_dim, patch_size)
        self.layers = nn.ModuleList()
        resolution, width = image_size // patch_size, embed_dim
        if absolute_positions:
            shape = (resolution, resolution, width)
            table = nn.init.trunc_normal_(torch.empty(shape), std=0.02)
            self.absolute_pos_embed = nn.Parameter(table)
        else:
            self.absolute_pos_embed = None
        for s, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            window = min(window_size, resolution)
            shifts = [
                window // 2 if b % 2 and resolution > window else 0
                for b in range(depth)
            ]
            stage = nn.Module()
            stage.blocks = nn.ModuleList(
                SwinBlock(width, heads, window, resolution, shift, mlp_ratio)
                for shift in shifts
            )
            stage.downsample = None
            if s < len(depths) - 1:
                stage.downsample = PatchMerging(width)
                resolution, width = resolution // 2, 2 * width
            self.layers.append(stage)
        self.norm, self.width = nn.LayerNorm(width), width

    def forward(self, x):
        """[B, H, W, 3] -> [B, C]."""
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed
        for stage in self.layers:
            for block in stage.blocks:
                x = block(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return self.norm(x).float().mean((1, 2))


class CausalAttention(nn.Module):
    """With PyTorch's own causal kernel."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        weight = nn.init.xavier_uniform_(torch.empty(3 * width, width))
        self.in_proj_weight = nn.Parameter(weight)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        """[T, L, C] -> the same."""
        rows, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).reshape(rows, length, width))


class TextBlock(nn.Module):
    """Causal attention and an MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-12)
        self.ln_2 = nn.LayerNorm(width, eps=1e-12)
        self.attn = CausalAttention(width, heads)
        self.mlp = Mlp(
            width, 4 * width, lambda x: x * (1.702 * x).sigmoid(), ("c_fc", "c_proj")
        )

    def forward(self, x):
        """[T, L, C] -> the same."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Text(nn.Module):
    """The text tower of `unicl_jax.encoders.text`."""

    def __init__(self, vocab_size, context_length, width, num_heads, num_layers):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        position = nn.init.normal_(torch.empty(context_length, width), std=0.02)
        self.positional_embedding = nn.Parameter(position)
        self.resblocks = nn.ModuleList(
            TextBlock(width, num_heads) for _ in range(num_layers)
        )
        self.ln_final, self.width = nn.LayerNorm(width, eps=1e-12), width

    def forward(self, tokens):
        """[T, L] -> [T, C]."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.resblocks:
            x = block(x)
        rows = torch.arange(len(x), device=x.device)
        return self.ln_final(x[rows, tokens.argmax(1)]).float()


class TransformersSwin(nn.Module):
    """The image tower as `transformers` has it."""

    def __init__(
        self,
        embed_dim,
        depths,
        num_heads,
        image_size,
        window_size=7,
        patch_size=4,
        mlp_ratio=4.0,
        absolute_positions=False,
    ):
        from transformers import SwinConfig, SwinModel

        super().__init__()
        config = SwinConfig(
            image_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depths=list(depths),
            num_heads=list(num_heads),
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            drop_path_rate=0.0,
            use_absolute_embeddings=absolute_positions,
        )
        self.model, self.width = SwinModel(config), config.hidden_size

    def forward(self, x):
        """[B, H, W, 3] -> [B, C]."""
        return self.model(x.permute(0, 3, 1, 2)).pooler_output.float()


class TransformersText(nn.Module):
    """The text tower as `transformers` has it."""

    def __init__(self, vocab_size, context_length, width, num_heads, num_layers):
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        config = CLIPTextConfig(
            vocab_size=vocab_size,
            max_position_embeddings=context_length,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=num_heads,
            num_hidden_layers=num_layers,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-12,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
        self.model, self.width = CLIPTextModel(config), width

    def forward(self, tokens):
        """[T, L] -> [T, C]."""
        return self.model(input_ids=tokens).pooler_output.float()


MODELS = {"plain": (Swin, Text), "transformers": (TransformersSwin, TransformersText)}


class TwoTower(nn.Module):
    """Both towers, their projections and the loss."""

    def __init__(self, model, config):
        super().__init__()
        image, text = dict(config["image"]), dict(config["text"])
        image = VARIANTS.get(image.pop("name"), {}) | image
        for option in ("drop_path", "remat", "init_std"):
            image.pop(option, None)  # other weights at the start, same work
        text.pop("name")
        make_image, make_text = MODELS[model]
        self.image_encoder, self.text_encoder = make_image(**image), make_text(**text)
        width = config["embed_dim"]
        for name, tower in (("image", self.image_encoder), ("text", self.text_encoder)):
            weight = nn.init.trunc_normal_(torch.empty(tower.width, width), std=0.02)
            self.register_parameter(f"{name}_projection", nn.Parameter(weight))
        self.logit_scale = nn.Parameter(torch.tensor(config["logit_scale_init"]))
        self.logit_scale_max = config["logit_scale_max"]

    def forward(self, images, batch):
        """Normalised images and the rest of a batch -> the loss."""
        u, v = self.image_encoder(images), self.text_encoder(batch["tokens"])
        with torch.autocast(images.device.type, enabled=False):
            u = F.normalize(u.float() @ self.image_projection, dim=-1)
            v = F.normalize(v.float() @ self.text_projection, dim=-1)
            if "text_index" in batch:
                v = v[batch["text_index"]]
            theta = self.logit_scale
            if self.logit_scale_max is not None:
                theta = theta.clamp(max=self.logit_scale_max)
            return unicl_loss(u, v, batch["label"], theta.exp())


def unicl_loss(u, v, labels, scale):
    """`unicl_jax.unicl_loss`, its mean."""
    logits = scale * (u @ v.T)
    same = (labels[:, None] == labels) & (labels >= 0)
    positive = (same | torch.eye(len(labels), dtype=bool, device=u.device)).float()
    n = positive.sum(1)
    hits = logits * positive
    per_image = logits.logsumexp(1) - hits.sum(1) / n
    per_text = logits.logsumexp(0) - hits.sum(0) / n
    return (per_image + per_text).mean() / 2
