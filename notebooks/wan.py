"""Wan 2.1, 1.3B and 14B, from a prompt or from a first frame too, by the commands of w2svd.py.

    python notebooks/wan.py train  --data my_clips/ --dry-run --gpu-memory 24          # the plan
    python notebooks/wan.py train  --data my_clips/ --out runs/wan                     # 1.3B
    python notebooks/wan.py train  --data my_clips/ --checkpoint Wan-AI/Wan2.1-T2V-14B-Diffusers
    python notebooks/wan.py sample --run runs/wan --prompt "a woman talks" --out talk.mp4
    python notebooks/wan.py export --run runs/wan --out lora/

Wan-AI/Wan2.1-I2V-14B-480P-Diffusers, or -720P-, goes on from a first frame. Flags and files are
those of w2svd.py, which does all but what stands here: what Wan is. None of it was run at full
size. What is not as in HunyuanVideo:

    text        umt5 alone, 512 tokens; behind those that count it reads zeros, which are not cut
                off; no pooled vector
    guidance    is not embedded: the real DiT needs a second evaluation, with a negative prompt in
                the caption's place, which is encoded once more into each clip's file
    latents     (z - mean) / std, of each channel, in place of one factor
    picture     more channels: a mask, and the latents of the picture with grey frames behind it;
                and CLIP's tokens of it, to which every block has an attention of its own;
                diffusers' own image-to-video pipeline needs `pip install ftfy`
    sampling    WanPipeline asks the scheduler for noise levels of its own: the exported card sets
                the grid

Wan 2.2 is refused: its two experts share the noise levels between them, its 5B gives each token a
level; a generator, a fake and a real DiT for each would be another method.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from wherever it is called

import w2svd  # noqa: E402
from w2svd import Config, Refused, torch  # noqa: E402 (whose allocator w2svd sets)

SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}  # 1.3B
PICTURE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}


class Wan(w2svd.VideoModel):
    """diffusers' WanTransformer3DModel with umt5, CLIP and Wan's VAE around it."""

    script = "notebooks/wan.py"
    checkpoint = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    transformer = "WanTransformer3DModel"
    released = {  # what differs from diffusers' defaults, so that a plan needs no download
        "": SMALL,
        checkpoint: SMALL,
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": {},
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": PICTURE,
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": PICTURE,
    }
    preset = {
        "frames": 81,
        "fps": 16.0,
        "shift": 3.0,  # of the released 480p; 5 at 720p, and in a peer's distillation (LightX2V)
        "guidance": 5.0,  # the released pipelines'; LightX2V: 3
        "generator_lr": 1e-4,  # peer: LightX2V's LoRA of rank 64, for 14B
        "fake_lr": 2e-5,  # peer: its fake's; both untested here
        "checkpointing": True,
        "log_every": 10,
    }
    # ours, in the manner of the released one; a checkpoint's w2svd.json may hold another
    prompt_template = {
        "negative": "overexposed, grey, still picture, blurry, low quality, compression artefacts, "
        "subtitles, painting, deformed face and hands, extra fingers, three legs, crowd behind, "
        "walking backwards"
    }
    text_limit, text_mb = 512, 8.4
    vae_flop = 8.4e6, 14.2e6  # in tiles, counted as HunyuanVideo's
    LAYERS = r"attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)|ffn\.net\.(0\.proj|2)"

    def __init__(self, module, config):
        m, blocks = module.config, len(module.blocks)
        self.embedders = (module.patch_embedding,)
        super().__init__(module, config)
        self.guidance = 1.0  # of the generator, which is sampled in one evaluation a step
        first = blocks // 3 if config.lora_targets == "single" else 0
        layers = "|".join(str(i) for i in range(first, blocks))
        self.lora_targets = rf"blocks\.({layers})\.({self.LAYERS})"
        self.early = "blocks", blocks // 3  # ours: as deep as HunyuanVideo's double-stream blocks
        self.form = "channels" if m.in_channels > m.out_channels else None
        reads = (2 * m.out_channels + 4, True) if self.form else (m.out_channels, False)
        last = m.pos_embed_seq_len is not None  # a model that reads a last frame, too
        self.known = (m.in_channels, m.image_dim is not None) == reads and not last
        self.patch = math.prod(m.patch_size)
        self.tokens = math.prod(self.video[1:]) // self.patch
        if self.form:  # the VAE reads each clip twice, and the cache holds both
            self.vae_flop = 2 * self.vae_flop[0], self.vae_flop[1]
            self.text_mb = self.text_mb + 4 * math.prod(self.video) / 1e6 + 0.7
        # simulated and counted at both sizes, as HunyuanVideo's numbers; wide: the MLP's width
        wide = m.ffn_dim / self.width
        at_work = 28.5 + 3.6 * wide + (2.2 if self.form else 0)
        self.block_memory = at_work, 23 + 2.1 * wide, 6.6 + 3.4 * wide
        self.moved = 482 + 13.7 * wide
        self.adapters = (14 + 2 * wide) / ((6 + 2 * wide) * self.width)
        if self.dtype != torch.float32:
            module.condition_embedder.time_embedder.register_forward_hook(self.time_in_float32)

    @classmethod
    def outline(cls, config):
        """The model without its weights, as in VideoModel; what is no Wan 2.1 is refused."""
        from diffusers import DiffusionPipeline

        if config.embedded_guidance != Config.embedded_guidance:
            raise Refused("Wan has no embedded guidance: give --guidance, the real DiT's.")
        if config.checkpoint not in cls.released:
            with w2svd.reading(f"--checkpoint {config.checkpoint} is no pipeline of diffusers"):
                index = DiffusionPipeline.load_config(config.checkpoint)
            if index.get("boundary_ratio") or index.get("expand_timesteps"):
                raise Refused(f"--checkpoint {config.checkpoint} is Wan 2.2: only 2.1 is known.")
        return super().outline(config)

    @property
    def blocks(self):
        return list(self.module.blocks)

    @staticmethod
    def time_in_float32(embedder, args, out):
        """Embed the noise level in float32, as diffusers keeps these weights.

        NOTE silent: inside of autocast these layers, too, would compute in bf16.
        """
        if out.is_meta:
            return out
        with torch.autocast(out.device.type, enabled=False):
            return embedder.forward(*args)

    @staticmethod
    def scaling(vae):
        """Mean and factor of each channel of the latents, (1, C, 1, 1, 1)."""
        both = vae.config.latents_mean, vae.config.latents_std
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1).to(vae.device, vae.dtype) for x in both)
        return mean, 1 / std

    def with_image(self, x_t, cond):
        """What the transformer reads: x_t, and beside it a mask of 4 channels and cond['image']."""
        if not self.form:
            return x_t
        mask = torch.zeros_like(x_t[:, :4])  # one channel for each frame of a latent one
        mask[:, :, 0] = 1
        return torch.cat([x_t, mask, cond["image"].to(x_t)], dim=1)  # (B, 2 C + 4, T, H, W)

    def velocity(self, x_t, sigma, cond):
        """x_t: latents (B, C, T, H, W); cond: prompt_embeds (B, 512, D), and image, picture."""
        with self.autocast(x_t):
            v = self.module(
                hidden_states=self.with_image(x_t, cond).to(self.dtype),
                timestep=1000 * sigma.float(),
                encoder_hidden_states=cond["prompt_embeds"].to(self.dtype),
                encoder_hidden_states_image=cond["picture"].to(self.dtype) if self.form else None,
                return_dict=False,
            )[0]
        return v.to(x_t.dtype)

    def guided_velocity(self, x_t, sigma, cond):
        """The velocity by which the backbone itself samples."""
        w, blind = self.config.guidance, w2svd.unconditional(cond)
        v = self.velocity(x_t, sigma, cond)
        return v if w == 1 else w2svd.guided(v, self.velocity(x_t, sigma, blind), w)

    def draw(self, sampler, velocity, sigmas, cond, seed):
        """Sample a video's latents, as in VideoModel; those of the backbone itself with guidance.

        NOTE silent: without it its films, beside the generator's, would be worse than it is.
        """
        if velocity == self.velocity:
            velocity = self.guided_velocity
        return super().draw(sampler, velocity, sigmas, cond, seed)

    @torch.no_grad()
    def encode_text(self, pipe, caption, first=None):
        """prompt_embeds and negative_prompt_embeds, each (1, 512, D).

        Of a first frame (1, 3, 1, H, W) in [-1, 1] also CLIP's tokens, 'picture' (1, N, D'), and
        the latents of it and of grey frames behind it, 'image' (1, C, T, H, W).
        """
        from diffusers import WanPipeline

        # NOTE silent: encode_prompt's own limit is 226 tokens, the pipeline's call has 512. It is
        # WanPipeline's function, as that of image-to-video does not run without ftfy
        texts = {
            "prompt_embeds": caption,
            "negative_prompt_embeds": self.prompt_template["negative"],
        }
        how = {"max_sequence_length": self.text_limit}
        cond = {n: WanPipeline._get_t5_prompt_embeds(pipe, x, **how) for n, x in texts.items()}
        if self.form:
            shown = pipe.video_processor.postprocess(first[:, :, 0], output_type="pil")
            cond["picture"] = pipe.encode_image(shown)
            grey = first.new_zeros(1, 3, self.config.frames - 1, *first.shape[3:])
            cond["image"] = self.encode_video(pipe, torch.cat([first, grey], dim=2))
        return cond

    def flop(self):
        """Of a forward: FLOP in linear layers, and in attention."""
        m, w, n = self.module.config, self.width, len(self.blocks)
        context = self.text_limit + (257 if self.form else 0)  # CLIP's tokens
        linear = self.tokens * (6 * w**2 + 2 * w * m.ffn_dim) + context * 2 * w**2
        return 2 * linear * n, 4 * self.tokens * (self.tokens + context) * w * n


def main(argv=None):
    """A command of w2svd.py with this model; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("train", "encode"):
        argv.insert(1, "--model=wan")
    return w2svd.main(argv, models={"wan": Wan})


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    sys.exit(main())
