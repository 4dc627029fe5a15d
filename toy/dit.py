"""A tiny DiT of HunyuanVideo's family: 3-D patches, adaLN-Zero, double-stream, then single-stream
blocks that attend over image and text tokens together, a condition of label (text) tokens.

The shape of a sample is any (C,) or (C, T, H, W): a 2-D point is a video of one pixel.

Given `waves`, the blocks also read sines and cosines of a patch's numbers: a network of smooth
layers learns the steep parts of a velocity, between two modes, much sooner from them.

Given `rest`, its blocks predict F, and the velocity follows in closed form (preconditioning): data
that scatter with a standard deviation `rest` in most dimensions have, with a = 1 - sigma,

    E[x0 | x_t] = (a rest^2 x_t + sigma^2 F) / (a^2 rest^2 + sigma^2)
    v           = ((sigma - a rest^2) x_t - sigma F) / (a^2 rest^2 + sigma^2).

F is 0 in these dimensions and as large as the data in the others, while the gain of x_t in v goes
from 1 to 1 / (2 rest) and back, in more dimensions than the blocks are wide.
"""

import math

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

CELLS = "b c (t pt) (h ph) (w pw)"  # a video cut into patches


def sinusoidal(sigma, width):
    """Embed sigma (B,) in [0, 1] as cos and sin at geometric frequencies: (B, width)."""
    frequencies = torch.exp(torch.linspace(0.0, 7.0, width // 2, device=sigma.device))
    angles = sigma[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def modulate(x, shift, scale):
    """adaLN: LayerNorm without weights of x (B, N, D), then a scale and a shift (B, 1, D)."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def attend(qkv, heads):
    """Softmax attention over all N tokens: fused (B, N, 3 * D) -> (B, N, D)."""
    if qkv.shape[1] == 1:  # a point is one token, which attends to itself alone
        return qkv.chunk(3, dim=-1)[2]
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def run_block(block, *args):
    return block(*args)


class Stream(nn.Module):
    """One stream of a double-stream block: its own modulation, projections and MLP."""

    def __init__(self, width):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def mlp(self, x):
        return self.mlp_out(F.gelu(self.mlp_in(x), approximate="tanh"))


class DoubleBlock(nn.Module):
    """Image and text keep their own weights and meet in one attention; text may be absent."""

    def __init__(self, width, heads, names):
        super().__init__()
        self.heads = heads
        self.streams = nn.ModuleDict({name: Stream(width) for name in names})

    def forward(self, c, *tokens):
        streams, tokens = self.streams.values(), list(tokens)
        knobs = [s.modulation(c)[:, None].chunk(6, dim=-1) for s in streams]
        qkv = [s.qkv(modulate(x, m[0], m[1])) for s, x, m in zip(streams, tokens, knobs)]
        mixed = attend(torch.cat(qkv, dim=1), self.heads)
        mixed = mixed.split([x.shape[1] for x in tokens], dim=1)
        for i, (s, m) in enumerate(zip(streams, knobs)):
            tokens[i] = tokens[i] + m[2] * s.proj(mixed[i])
            tokens[i] = tokens[i] + m[5] * s.mlp(modulate(tokens[i], m[3], m[4]))
        return tokens


class SingleBlock(nn.Module):
    """All tokens share the weights; attention and MLP run in parallel on one input."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.width = heads, width
        self.modulation = nn.Linear(width, 3 * width)
        self.linear_in = nn.Linear(width, 7 * width)  # qkv and the MLP's hidden layer
        self.linear_out = nn.Linear(5 * width, width)

    def forward(self, c, x):
        shift, scale, gate = self.modulation(c)[:, None].chunk(3, dim=-1)
        hidden = self.linear_in(modulate(x, shift, scale))
        qkv, mlp = hidden.split([3 * self.width, 4 * self.width], dim=-1)
        mlp = F.gelu(mlp, approximate="tanh")
        return x + gate * self.linear_out(torch.cat([attend(qkv, self.heads), mlp], dim=-1))


class DiT(nn.Module):
    """velocity(x_t (B, *shape), sigma (B,), labels (B,) or None) -> v (B, *shape).

    `labels` counts the captions that it knows. Without any there are no text tokens; with some,
    None reads as one more caption, 'no caption'. `extra` channels behind the sample's are read, as
    a condition that has its place in the clip, and not predicted.
    """

    # every linear layer of the blocks; with two blocks, an adapter off the modulation can hardly
    # tell noise levels apart, and W2SVD's weights of the modes drift (measured)
    lora_targets = r"(double|single)_blocks\..*(modulation|qkv|proj|_in|_out)"

    def __init__(
        self,
        shape,
        width,
        heads,
        double,
        single,
        patch=(1, 1, 1),
        labels=0,
        rest=None,
        waves=(),
        extra=0,
    ):
        super().__init__()
        self.shape, self.patch, self.rest, self.waves = tuple(shape), tuple(patch), rest, waves
        self.grid = self.shape if len(shape) == 4 else (*shape, 1, 1, 1)  # C, T, H, W
        size = self.grid[0] * patch[0] * patch[1] * patch[2]
        tokens = self.grid[1] * self.grid[2] * self.grid[3] * self.grid[0] // size
        read = size // self.grid[0] * (self.grid[0] + extra)
        self.embed = nn.Linear(read * (1 + 2 * len(waves)), width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.text = nn.Embedding(labels + 1, width) if labels else None
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        names = ("image", "text") if labels else ("image",)
        self.double_blocks = nn.ModuleList(DoubleBlock(width, heads, names) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(width, heads) for _ in range(single))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, size)
        self.run = run_block  # or Roles.checkpoint, to save memory
        for name, layer in self.named_modules():  # adaLN-Zero: every block starts as the identity
            if name.endswith(("modulation", "final")):
                nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def patches(self, x):
        """Samples (B, *shape) as tokens: (B, N, C * pt * ph * pw)."""
        pt, ph, pw = self.patch
        x = x.reshape(len(x), -1, *self.grid[1:])
        return rearrange(x, f"{CELLS} -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)

    def with_waves(self, patches):
        """Patches (B, N, P) and the waves of each of their numbers: (B, N, P (1 + 2 waves))."""
        angles = [math.pi * wave * patches for wave in self.waves]
        return torch.cat([patches, *(f(a) for a in angles for f in (torch.sin, torch.cos))], dim=-1)

    def unpatch(self, tokens):
        """The inverse of patches: (B, N, C * pt * ph * pw) -> (B, *shape)."""
        (pt, ph, pw), (_, t, h, w) = self.patch, self.grid
        sizes = {"t": t // pt, "h": h // ph, "w": w // pw, "pt": pt, "ph": ph, "pw": pw}
        x = rearrange(tokens, f"b (t h w) (c pt ph pw) -> {CELLS}", **sizes)
        return x.reshape(-1, *self.shape)

    def double_stream(self, x_t, sigma, labels=None):
        """After the double-stream blocks: [image tokens (B, N, D), text tokens], and c (B, D)."""
        tokens = [self.embed(self.with_waves(self.patches(x_t))) + self.position]  # (B, N, D)
        c = self.time(sinusoidal(sigma, self.position.shape[-1]))  # (B, D)
        if self.text:
            nothing = torch.full(x_t.shape[:1], self.text.num_embeddings - 1, device=x_t.device)
            c = c + self.text(nothing if labels is None else labels)
            tokens.append(c[:, None])  # the noise level too, as behind HunyuanVideo's refiner
        c = F.silu(c)
        for block in self.double_blocks:
            tokens = self.run(block, c, *tokens)
        return tokens, c

    def forward(self, x_t, sigma, labels=None):
        tokens, c = self.double_stream(x_t, sigma, labels)
        x = torch.cat(tokens, dim=1)
        for block in self.single_blocks:
            x = self.run(block, c, x)
        shift, scale = self.final_modulation(c)[:, None].chunk(2, dim=-1)
        f = self.unpatch(self.final(modulate(x[:, : len(self.position)], shift, scale)))
        if self.rest is None:
            return f
        sigma = sigma.reshape(-1, *[1] * len(self.shape))
        a, variance, x_t = 1 - sigma, self.rest**2, x_t[:, : self.shape[0]]
        return ((sigma - a * variance) * x_t - sigma * f) / (a**2 * variance + sigma**2)
