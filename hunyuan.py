"""HunyuanVideo around the method: clips in (encode), the task of w2svd.train(), videos and LoRA
files out (sample, export). How the model is called at all, its timestep, guidance, text and adapted
layers, is class HunyuanVideo below; nothing of the method stands here.
"""

import csv
import dataclasses
import functools
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from w2svd import (
    ENCODED,
    HUNYUAN,
    Config,
    Refused,
    Roles,
    check,
    euler_sample,
    few_step_sample,
    few_step_sigmas,
    hold,
    read_generator,
    read_run,
    read_safetensors,
    whole,
    write_json,
    write_safetensors,
)


class HunyuanVideo:
    """diffusers' HunyuanVideoTransformer3DModel behind the contract of Roles."""

    # every linear layer of the blocks but adaLN's: 4.30 M parameters for each unit of rank at 13B
    ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    MLP = r"ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out"

    def __init__(self, config, module, dtype):
        self.module, self.dtype, self.guidance = module, dtype, config.embedded_guidance
        layers = f"{self.ATTENTION}|{self.MLP}" if config.lora_targets == "all" else self.ATTENTION
        self.lora_targets = rf"(single_)?transformer_blocks\.\d+\.({layers})"
        self.blocks = [*module.transformer_blocks, *module.single_transformer_blocks]
        for block in self.blocks:  # text comes trimmed: no mask, which would rule out flash
            block.register_forward_pre_hook(lambda _, args: (*args[:3], None, *args[4:]))

    def checkpoint_with(self, function):
        self.module.gradient_checkpointing = True
        self.module._gradient_checkpointing_func = function

    def velocity(self, x_t, sigma, cond):
        """x_t: latents (B, C, T, H, W); cond: prompt_embeds (B, L, D), trimmed; pooled (B, P)."""
        text = cond["prompt_embeds"].to(self.dtype)
        guidance = torch.full((len(x_t),), self.guidance, dtype=self.dtype, device=x_t.device)
        device = x_t.device.type.replace("meta", "cpu")  # the meta device knows no autocast
        # NOTE silent: without autocast the float32 adapters would compute in float32
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            v = self.module(
                hidden_states=x_t.to(self.dtype),
                timestep=1000 * sigma.float(),  # NOTE silent: bf16 would make 956 of 954.5
                encoder_hidden_states=text,
                encoder_attention_mask=torch.ones(text.shape[:2], device=x_t.device),
                pooled_projections=cond["pooled"].to(self.dtype),
                guidance=guidance * 1000,  # 6016 in bf16, as in the stock pipeline
                return_dict=False,
            )[0]
        return v.to(x_t.dtype)


TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def hardware():
    """The device and the backbone's dtype: bf16 on a GPU."""
    if torch.cuda.is_available():
        return "cuda", torch.bfloat16
    return "cpu", torch.float32


def latent_shape(config, channels):
    """[C, T, H, W] of a video's latents: the VAE takes 4 frames and 8 x 8 pixels into one."""
    return [channels, (config.frames - 1) // 4 + 1, config.height // 8, config.width // 8]


def latent_space(config):
    """Channels and scaling factor of the checkpoint's VAE."""
    from diffusers import AutoencoderKLHunyuanVideo as VAE

    with reading(config.checkpoint):
        found = VAE.load_config(config.checkpoint, subfolder="vae")
        if found.get("_class_name") != VAE.__name__:
            raise ValueError(f"its VAE is a {found.get('_class_name')}")
        channels, scaling = found["latent_channels"], found["scaling_factor"]
        if not 0 < channels <= 1024 or not 0 < scaling < math.inf:
            raise ValueError(f"its VAE has {channels} channels, scaled by {scaling}")
        return channels, scaling


@contextmanager
def reading(checkpoint):
    """Loading inside: what diffusers cannot read is refused in one sentence."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):  # their bars would cut through ours
        library.utils.logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
            AssertionError, RuntimeError) as error:  # fmt: skip
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = shown((str(error).strip().splitlines() or ["?"])[0].rstrip("."))
        raise Refused(f"--checkpoint {shown(checkpoint)} is no folder, nor a hub id within reach, "
                      f"with a HunyuanVideo in diffusers' format: {reason}.") from error


def hunyuan_pipeline(config, without):
    """diffusers' pipeline of the checkpoint; the parts named in `without` stay unread."""
    from diffusers import HunyuanVideoPipeline

    device, dtype = hardware()
    with reading(config.checkpoint):
        pipe = HunyuanVideoPipeline.from_pretrained(
            config.checkpoint, dtype=dtype, use_safetensors=True, **dict.fromkeys(without))
    if pipe.vae:
        pipe.vae.enable_tiling()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


# ---- clips in ------------------------------------------------------------------------------------


def write_video(path, frames, fps):
    """Frames (T, H, W, 3) in 0..255 as .mp4 or .gif; whole or not at all."""
    import imageio.v3 as iio

    how = {"plugin": "FFMPEG", "fps": fps}
    if path.suffix == ".gif":
        how = {"duration": 1000 / fps, "loop": 0}
    with whole(path) as half:
        iio.imwrite(half, frames, **how)


def digest(text):
    # names of files need not be UTF-8: Python then gives their bytes as surrogates
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def shown(text):
    """Text in one line of a terminal: control characters escaped; a long one cut and marked."""
    text = text if len(text) <= 200 else f"{text[:200]}... ({digest(text)})"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def safe_name(text):
    """A file name out of any text: no slash, no control character, at most 180 bytes."""
    name = re.sub(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]", "_", text)
    short = name.encode()[:171].decode(errors="ignore")
    return name if len(name.encode()) <= 180 else f"{short}-{digest(text)}"


def header(path):
    """A safetensors file's own JSON and {tensor: (type, shape)}; two None if it is not ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") if path.is_file() else io.BytesIO() as file:
            size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= 2**24:  # safetensors would take 2 GiB of memory for the 100 MB it allows
            return None, None
        with safe_open(path, "pt") as file:
            info = dict(json.loads((file.metadata() or {})["w2svd"]))
            info.pop("content_sha256", None)  # of everything, which is not read here
            slices = {name: file.get_slice(name) for name in file.keys()}
            return info, {n: (x.get_dtype(), x.get_shape()) for n, x in slices.items()}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        return None, None


def make_folder(folder):
    """Make a folder and see that files can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Refused(f"{folder} cannot be written ({error}); name another --out.") from error


def read_text(path, most=2**26):
    """Text of a regular file of bounded size: a device may be endless, a pipe may never end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"{path} has more than {most} bytes")
    return content.decode("utf-8-sig")  # Excel begins a file with a mark


def read_lines(path):
    """The lines of a text file that are not empty."""
    try:
        return [line.strip() for line in read_text(Path(path)).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read as text ({error}).") from error


def find_clips(folder):
    """[(path, caption)] of a folder in one of the usual conventions; captions may be empty."""
    def text(name):
        if not is_inside(folder / name, folder):
            raise OSError(f"{name} is no file of the folder")
        return read_text(folder / name)

    try:
        if (folder / "metadata.jsonl").exists():
            rows = [json.loads(x) for x in text("metadata.jsonl").split("\n") if x.strip()]
        elif (folder / "metadata.csv").exists():
            rows = list(csv.DictReader(io.StringIO(text("metadata.csv"), newline="")))
        elif (folder / "videos.txt").exists():
            both = text("videos.txt").splitlines(), text("prompt.txt").splitlines()
            rows = [{"file_name": n, "text": t} for n, t in zip(*both, strict=True) if n.strip()]
        else:
            films = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES]
            rows = [{"file_name": p.name, "text": caption_beside(p)} for p in films]
        return [(folder / row["file_name"].strip(), (row["text"] or "").strip()) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error,
            RecursionError) as error:  # fmt: skip
        raise Refused(f"--videos {folder} cannot be read ({shown(str(error))}): it needs a.mp4 "
                      "with a.txt, metadata.jsonl or .csv with file_name and text, or videos.txt "
                      "with prompt.txt.") from error  # fmt: skip


SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi")


def caption_beside(path):
    """The text of a.txt for a.mp4; empty where there is none that can be read."""
    text = path.with_suffix(".txt")
    try:
        return read_text(text) if is_inside(text, path.parent) else ""
    except (OSError, ValueError):
        return ""


def is_inside(path, folder):
    """Whether it is a regular file of the folder, also where its links end."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


# No playlist, which would read other files or a network, and no end of computing: ffmpeg guesses
# the format from the content, whatever the name says
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,gif"
GUARD = ["-protocol_whitelist", "file", "-format_whitelist", FORMATS, "-timelimit", "600"]


def read_clip(path, config):
    """The first frames of a video, resampled, resized, cropped: (1, 3, T, H, W) in [-1, 1]."""
    import imageio.v3 as iio

    w, h = config.width, config.height
    # cropped before it is scaled: a picture of 8000 x 2 would be scaled to 192,000 x 48
    fit = (f"fps={config.fps},crop=max(1\\,min(iw\\,ih*{w}/{h})):max(1\\,min(ih\\,iw*{h}/{w})),"
           f"scale={w}:{h}")  # fmt: skip
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it tells every change of size
    try:
        # the whole path, or a name like 'concat:a' would be read as a protocol
        video = iio.imiter(path.resolve(), plugin="FFMPEG", input_params=[*GUARD],
                           output_params=["-vf", fit])  # fmt: skip
        frames = [torch.from_numpy(x) for x in itertools.islice(video, config.frames)]
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise Refused("it cannot be decoded") from error
    if len(frames) < config.frames:
        raise Refused(f"too short: {len(frames)} of {config.frames} frames at {config.fps:g} fps")
    return torch.stack(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1


@torch.no_grad()
def encode_text(pipe, caption, config):
    """prompt_embeds (1, L, D), trimmed to the L tokens that count, and pooled (1, P)."""
    if len(caption) > 2**17 or re.search("[\ud800-\udfff]", caption):
        raise Refused(f"the text {shown(caption)} is no Unicode or has over {2**17} characters.")
    own = {"template": config.prompt_template, "crop_start": config.prompt_crop_start}
    how = {"prompt_template": own} if config.prompt_template else {}
    embeds, pooled, mask = pipe.encode_prompt(caption, **how)
    if not mask.any():
        raise Refused(f"nothing is left of the text {caption[:40]!r}: check --prompt-crop-start, "
                      "which is 0 for a template of '{}'.")  # fmt: skip
    return {"prompt_embeds": embeds[:, mask[0].bool()], "pooled": pooled}


@torch.no_grad()
def encode_clip(pipe, path, info, config):
    """Tensors of one clip, without a batch: text and, where there is a video, its latents."""
    video = read_clip(path, config) if path else None
    pipe = pipe()  # read only once there is something to encode
    tensors = encode_text(pipe, info["caption"], config)
    if path:
        video = video.to(pipe.device, pipe.vae.dtype)
        latents = pipe.vae.encode(video).latent_dist.mode()
        tensors["latents"] = latents.float() * info["scaling"]
    tensors = {name: x[0] for name, x in tensors.items()}
    if path and list(tensors["latents"].shape) != info["shape"]:
        raise Refused(f"its latents are {list(tensors['latents'].shape)}, not {info['shape']}")
    if not all(x.isfinite().all() for x in tensors.values()):
        raise Refused("its latents or its text are not finite")
    return tensors


LARGEST = 2**34  # bytes of a film; all of them are read, for the checksum


def describe(path, caption, folder, settings):
    """The header of a clip's file: what it is made of. Clips that cannot be used are refused."""
    if not caption:
        raise Refused("it has no caption")
    if not path:
        return settings | {"caption": caption, "source": caption}
    try:
        if not is_inside(path, folder):
            raise Refused("there is no such file in the folder")
        if path.stat().st_size > LARGEST:
            raise Refused(f"it has more than {LARGEST >> 30} GiB: cut it into clips")
        source = str(path.resolve().relative_to(folder.resolve()))
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # a name of 5000 letters, a file of somebody else
        raise Refused(f"it cannot be read ({error.strerror})") from error
    return settings | {"caption": caption, "source": source, "sha256": sha256}


def is_encoded(path, info):
    """Whether the clip's file is there, whole, and made of this source with these settings."""
    try:
        return header(path)[0] == info and read_safetensors(path)[1] == info
    except Refused:
        return False


def add_clip(out, path, info, config, pipe, clips):
    """Encode one clip unless that was done, with the same settings; its file joins `clips`."""
    name = f"{safe_name(info['source'])}-{digest(info['source'])}.safetensors"
    if name in clips:
        raise Refused("it is listed twice")
    if not is_encoded(out / name, info):
        write_safetensors(out / name, encode_clip(pipe, path, info, config), info)
    clips[name] = info


def add_clips(found, out, folder, settings, config, pipe):
    """Encode all; the names of the files, and the clips that cannot be used with the reasons."""
    from tqdm import tqdm

    clips, skipped = {}, {}
    with tqdm(found, desc="encode", unit="clip") as bar:
        for path, caption in bar:
            try:
                info = describe(path, caption, folder, settings)
                add_clip(out, path, info, config, pipe, clips)
            except Refused as reason:
                skipped[f"{len(skipped) + 1}. {shown(str(path or caption))}"] = str(reason)
            bar.set_postfix_str(f"{len(skipped)} skipped")
    return list(clips), skipped


def encode(videos="", prompts="", **settings):
    """Clips with captions, or captions alone, into --out; 1 if any was skipped, or else 0."""
    config = Config(**{"model": "hunyuan"} | settings)
    if bool(videos) == bool(prompts) or not config.out or config.model != "hunyuan":
        raise Refused("encode needs --out and either --videos, a folder, or --prompts, a file, for "
                      "--model hunyuan; the toy encodes nothing.")  # fmt: skip
    check(config)
    check_clips(config)
    out, folder = Path(config.out), Path(videos)

    @functools.cache
    def pipe():  # if it is needed; bf16 would round the latents
        loaded = hunyuan_pipeline(config, ("transformer",))
        loaded.vae.float()
        return loaded

    found = find_clips(folder) if videos else [(None, text) for text in read_lines(prompts)]
    channels, scaling = latent_space(config)
    settings = {name: getattr(config, name) for name in ENCODED}
    settings["scaling"] = scaling
    settings["shape"] = latent_shape(config, channels) if videos else None
    with hold(out):
        clips, skipped = add_clips(found, out, folder, settings, config, pipe)
        report = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
        if not clips:
            raise Refused(f"Nothing in {videos or prompts} can be used:{report or ' it is empty'}.")
        write_json(out / "index.json", {"settings": settings, "clips": clips, "skipped": skipped})
    print(f"{len(clips)} clips in {out}, {len(skipped)} skipped{report}")
    return 1 if skipped else 0


def encoded_with(folder):
    """Settings that a data folder imposes on a run; none while there is no such folder."""
    if not (Path(folder) / "index.json").exists():
        return {}
    return {name: read_index(folder)["settings"][name] for name in ENCODED}


def read_index(folder):
    """What encode left in its folder: settings, clips, skipped."""
    try:
        index = json.loads(read_text(Path(folder) / "index.json"))
        settings, clips = index["settings"], index["clips"]
        same = all(type(settings[name]) is type(getattr(Config, name)) for name in ENCODED)
        named = isinstance(clips, list) and all(isinstance(name, str) for name in clips)
        if same and named and {"scaling", "shape"} <= settings.keys() and clips:
            return index
    except OSError as error:
        raise Refused(f"--data {folder} holds no encoded clips: run encode --out {folder} first, "
                      "or name a folder that it wrote.") from error  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # as a file that lacks something
    raise Refused(f"{folder}/index.json is damaged: run encode again; it keeps what is done.")


def encoded_clips(config, shape, sizes):
    """Paths of the clips in config.data, each whole and of this run's size, scaling and model."""
    folder, index = Path(config.data), read_index(config.data)
    _, scaling = latent_space(config)
    if index["settings"]["shape"] is None and config.generator_input == "paired":
        raise Refused(f"{folder} holds captions alone: use --generator-input rollout, since "
                      "paired input is made of clips.")  # fmt: skip
    wanted = {"shape": index["settings"]["shape"] and shape, "scaling": scaling}
    paths = [folder / Path(name).name for name in index["clips"]]
    for path in paths:
        info, tensors = header(path)
        if not isinstance(info, dict) or not fits_a_clip(tensors, info.get("shape")):
            raise Refused(f"{path} is not a whole clip: run encode again; it keeps what is done.")
        differ = {name: info.get(name) for name in wanted if info.get(name) != wanted[name]}
        if differ:
            raise Refused(f"{path} was encoded with {shown(str(differ))}, this run has {wanted}: "
                          "encode for it, or leave --height, --width and --frames to the data.")
        text = [tensors[name][1][-1] for name in ("prompt_embeds", "pooled")]
        if text != [sizes.text_embed_dim, sizes.pooled_projection_dim]:
            raise Refused(f"{path} was encoded for another model: its text is {text} numbers wide.")
    return paths


def fits_a_clip(tensors, shape):
    """Whether these are a clip's tensors by type and shape; `shape` is its latents', or None."""
    tensors = dict(tensors)
    latents = tensors.pop("latents", ("F32", None))
    if latents != ("F32", shape) or set(tensors) != {"prompt_embeds", "pooled"}:
        return False
    (kind, text), (pooled_kind, pooled) = tensors["prompt_embeds"], tensors["pooled"]
    # 256 tokens are HunyuanVideo's most
    return ({kind, pooled_kind} <= {"F32", "BF16", "F16"} and len(pooled) == 1
            and len(text) == 2 and 0 < text[0] <= 1024)  # fmt: skip


# ---- the task ------------------------------------------------------------------------------------


class Task:
    """HunyuanVideo and a folder of encoded clips, as a task."""

    def __init__(self, config):
        if config.compile and config.fp8_base:
            raise Refused("--compile does not work on --fp8-base: casting breaks every graph.")
        if config.batch != 1 or config.guidance != 1:
            raise Refused("--model hunyuan takes --batch 1, whose text needs no mask (--accumulate "
                          "adds up more), and --guidance 1: its guidance is embedded.")
        if config.sample_every % config.log_every:
            raise Refused("--sample-every must be a multiple of --log-every.")
        self.config, (self.device, self.dtype) = config, hardware()
        self.backbone = HunyuanVideo(config, self.empty(), torch.bfloat16)
        self.shape = latent_shape(config, self.backbone.module.config.in_channels)
        with reading(config.checkpoint), torch.no_grad():  # do the config's sizes go together?
            self.backbone.velocity(*self.nothing())

    def nothing(self):
        """Inputs of a velocity on the meta device, which has shapes and no numbers."""
        sizes = self.backbone.module.config
        with torch.device("meta"):
            cond = {"prompt_embeds": torch.empty(1, 256, sizes.text_embed_dim),
                    "pooled": torch.empty(1, sizes.pooled_projection_dim)}  # fmt: skip
            return torch.empty(1, *self.shape), torch.empty(1), cond

    def empty(self):
        """The transformer without weights, on the meta device, in bf16."""
        from diffusers import HunyuanVideoTransformer3DModel as Model

        found = {"_class_name": Model.__name__}  # the released model is the class's defaults
        if self.config.checkpoint != HUNYUAN:
            with reading(self.config.checkpoint):
                found = Model.load_config(self.config.checkpoint, subfolder="transformer")
        if found.get("_class_name") != Model.__name__ or found.get("image_condition_type"):
            raise Refused(f"--checkpoint {self.config.checkpoint} is not a text-to-video "
                          "HunyuanVideo: its transformer's config says otherwise.")  # fmt: skip
        with reading(self.config.checkpoint), torch.device("meta"):
            sizes = [x for x in found.values() if isinstance(x, int)]
            if max(sizes, default=0) > 2**16:
                raise ValueError(f"its transformer's config has a size of {max(sizes)}")
            return Model.from_config(found).bfloat16()

    def load(self):
        """Check the data, then read the weights."""
        from diffusers import HunyuanVideoTransformer3DModel as Model

        config, sizes = self.config, self.backbone.module.config
        if self.device == "cpu" and self.backbone.module.num_parameters() > 1e9:
            raise Refused("This model needs a GPU with the memory of the plan above, and torch "
                          "finds none; --dry-run needs none.")  # fmt: skip
        if config.weights == "random":
            rng = torch.Generator().manual_seed(config.seed)
            text, pooled = sizes.text_embed_dim, sizes.pooled_projection_dim
            self.noise = {"latents": torch.randn(self.shape, generator=rng), "pooled":
                          torch.randn(pooled, generator=rng),
                          "prompt_embeds": torch.randn(256, text, generator=rng)}  # fmt: skip
            module = self.empty().to_empty(device=self.device)
            torch.manual_seed(config.seed)
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        else:
            self.clips = encoded_clips(config, self.shape, sizes)
            with reading(config.checkpoint):
                module = Model.from_pretrained(
                    config.checkpoint, subfolder="transformer", dtype=self.dtype,
                    use_safetensors=True)  # fmt: skip
        with reading(config.checkpoint):
            module = module.to(self.device, self.dtype).requires_grad_(False)
        self.backbone = HunyuanVideo(config, module, self.dtype)

    def prepare(self):
        """What must follow the adapters: the base's weights in 8 bits, compilation."""
        if self.config.fp8_base:  # NOTE silent: before them, the adapters would be 8 bits too
            self.backbone.module.enable_layerwise_casting(torch.float8_e4m3fn, self.dtype)
        if self.config.compile:  # 2 kinds of block, 3 roles and none, gradient, lengths of text
            torch._dynamo.config.recompile_limit = 64
            for block in self.backbone.blocks:
                block.compile()

    def read(self, i):
        """Clip i as a batch of one; x0 is 0 where there is a caption alone."""
        random = self.config.weights == "random"
        name = "noise" if random else str(self.clips[i])  # for an error to say
        try:
            tensors = self.noise if random else read_safetensors(self.clips[i])[0]
        except Refused as error:
            raise Refused(f"{error} Run encode again; it keeps what is whole.") from error
        cond = {name: x[None].to(self.device) for name, x in tensors.items()}
        x0 = cond.pop("latents", torch.zeros(1, *self.shape, device=self.device))
        return {"x0": x0, "cond": cond, "name": name}

    def batches(self, rng):
        while True:
            n = 1 if self.config.weights == "random" else len(self.clips)
            yield self.read(int(torch.randint(n, (1,), generator=rng, device=rng.device)))

    def costs(self, forwards, with_gradient):
        """FLOPs and memory of an iteration with so many forwards, counted on the meta device."""
        from torch.utils.flop_counter import FlopCounterMode

        config, backbone = self.config, HunyuanVideo(self.config, self.empty(), torch.bfloat16)
        sizes = backbone.module.config
        with torch.device("meta"):
            roles = Roles(backbone, config.lora_rank, 0.25, 1, config.generator, config.fake)
        inputs = self.nothing()
        memory = self.memory(backbone, roles, inputs)
        with FlopCounterMode(display=False) as plain, torch.no_grad():
            roles.fake(*inputs)
        if config.checkpointing:
            roles.use_checkpointing()
        with FlopCounterMode(display=False) as trained:  # forward, recomputation, backward
            roles.fake(*inputs).sum().backward()
        pflop = [counter.get_total_flops() / 1e15 for counter in (plain, trained)]
        in_all = config.accumulate * (forwards * pflop[0] + with_gradient * pflop[1])
        gib = {f"gib_{name}": size / 2**30 for name, size in memory.items()}
        at_hand = torch.cuda.mem_get_info()[1] / 2**30 if self.device == "cuda" else 0.0
        room, need = config.gpu_memory or at_hand, sum(gib.values())
        return {
            "tokens": math.prod(self.shape[1:]) // sizes.patch_size**2 // sizes.patch_size_t + 256,
            "pflop_per_forward": pflop[0], "pflop_per_forward_with_gradient": pflop[1],
            "pflop_per_iteration": in_all,
            "floor_seconds_per_iteration": in_all * 1e3 / config.tflops,
            **gib, "gib_in_all": need, "gib_of_the_gpu": room,
            "fits": need <= room if room else "no GPU found: name --gpu-memory",
        }  # fmt: skip

    def memory(self, backbone, roles, inputs):
        """Bytes by line; what a block keeps for its backward is weighed block by block."""
        read, saved = [], []

        def weigh(block, *args):
            kept, n = {}, args[0].shape[1] + args[1].shape[1]

            def keep(x):  # the meta device alone keeps the attention matrix
                if x.shape[-2:] != (n, n) and x.untyped_storage()._cdata not in weights:
                    kept[x.untyped_storage()._cdata] = x
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                out = block(*args)
            read.append(sum(x.nbytes for x in args[:2]))
            saved.append(sum(x.untyped_storage().nbytes() for x in kept.values()))
            return out

        trained = [roles.parameters(role) for role in ("generator", "fake")]
        for parameter in itertools.chain(*trained):  # as autocast uses them
            parameter.data = parameter.data.bfloat16()
        fake = roles.copies.get("fake", backbone)
        weights = {p.untyped_storage()._cdata for p in fake.module.parameters()}
        fake.checkpoint_with(weigh)
        roles.fake(*inputs)
        fake.module.gradient_checkpointing = False
        if self.config.fp8_base:
            backbone.module.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
        trained = [sum(p.numel() for p in parameters) for parameters in trained]
        lines = {
            "base": sum(p.nbytes for p in backbone.module.parameters() if not p.requires_grad),
            "trained_weights": 4 * sum(trained),
            "gradients_adam_ema": 4 * max(trained) + 8 * sum(trained) + 4 * trained[0],
            "inputs_of_blocks": sum(read) if self.config.checkpointing else 0,
            "recomputed_block": max(saved) if self.config.checkpointing else sum(saved),
        }
        # ours, not measured: 2 GiB for CUDA, a tenth of the activations: fragments, float32 norms
        margin = 2**31 + (lines["inputs_of_blocks"] + lines["recomputed_block"]) // 10
        return lines | {"margin": margin}

    def decode(self, latents):
        """Latents (1, C, T, H, W) -> frames (T', H', W', 3) in 0..255; the VAE comes and goes."""
        pipe = hunyuan_pipeline(self.config, (*TEXT, "transformer"))
        with torch.no_grad():
            x = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
            video = pipe.vae.decode(x, return_dict=False)[0]
        frames = pipe.video_processor.postprocess_video(video, output_type="np")[0]
        return (frames * 255).round().astype("uint8")

    def on_log(self, step, generator):
        """Every sample_every iterations: the first caption, always from the same noise."""
        config = self.config
        if config.weights == "random" or step % config.sample_every:
            return
        rng = torch.Generator(self.device).manual_seed(config.seed)
        cond = self.read(0)["cond"]
        noise = torch.randn(1, *self.shape, generator=rng, device=self.device)
        sigmas = few_step_sigmas(config.steps, config.shift)
        views = [self.decode(few_step_sample(generator, noise, sigmas, cond, rng))]
        if config.compare:  # outside of any role there is no adapter; 7 is the released shift
            plain = euler_sample(self.backbone.velocity, noise, few_step_sigmas(28, 7.0), cond)
            views.append(self.decode(plain))
        folder = Path(config.out) / "samples"
        folder.mkdir(exist_ok=True)
        if folder.is_symlink():
            raise Refused(f"{folder} leads out of the run's folder; remove the link.")
        write_video(folder / f"{step:06}.mp4", views[0], config.fps)
        beside = torch.cat([torch.from_numpy(view) for view in views], dim=2).numpy()
        write_video(folder / f"{step:06}.gif", beside[::2], config.fps / 2)

    def finish(self, run):
        """No exact answer here: the last logged numbers."""
        last = (run.folder / "metrics.jsonl").read_text().splitlines()[-1]
        result = {"student": {**json.loads(last), "steps": run.config.steps}}
        if run.config.weights == "random":
            return result, "done; random weights have nothing to show"
        return result, f'now: w2svd.py sample --run {run.folder} --prompt "..." --out video.mp4'

    def check_generator(self, tensors):
        """Refuse weights that are not finite or not of this model; before anything is written."""
        config = self.config
        with torch.device("meta"):
            twin = HunyuanVideo(config, self.empty(), torch.bfloat16)
            state = Roles(twin, config.lora_rank, 0.25, 1, config.generator).state("generator")
        prefix = "transformer." if config.generator == "lora" else ""
        wanted = {prefix + name: x.shape for name, x in state.items()}
        whole = all(x.dtype == torch.float32 and x.isfinite().all() for x in tensors.values())
        if not whole or {name: x.shape for name, x in tensors.items()} != wanted:
            raise Refused(f"The generator of {config.out} is damaged or of another model: its "
                          "tensors differ in names or shapes, or are not finite float32.")

    def sample(self, tensors, info, out, seed, prompt="", prompts="", videos_per_prompt=1,
               lora_scale=1.0, compare=False):  # fmt: skip
        """The generator in diffusers' own pipeline: one .mp4, or a folder with VBench's names."""
        if bool(prompt) == bool(prompts) or videos_per_prompt < 1:
            raise Refused("Name either --prompt or --prompts, and at least one video per prompt.")
        if (out.suffix != ".mp4") != bool(prompts) or prompt and videos_per_prompt > 1:
            raise Refused("--out must be one .mp4 for --prompt, or a folder for --prompts.")
        texts, config = read_lines(prompts) if prompts else [prompt], self.config
        refuse_random(config)
        if not texts or out.is_dir() != bool(prompts and out.exists()):
            raise Refused(f"{prompts or out} is empty or of the wrong kind.")
        if not -100 < lora_scale < 100 or info["kind"] == "full" and lora_scale != 1:
            raise Refused("--lora-scale must lie in (-100, 100); a full generator has none.")
        self.check_generator(tensors)
        reader = hunyuan_pipeline(config, ("transformer", "vae"))
        jobs = {text: encode_text(reader, text, config) for text in texts}
        del reader  # before the transformer comes; cycles hold it
        gc.collect()
        pipe = hunyuan_pipeline(config, TEXT)

        def draw(mark="", **how):
            for text, k in itertools.product(jobs, range(videos_per_prompt)):
                path = out.with_name(f"{out.stem}{mark}.mp4")
                if prompts:
                    name = safe_name(text)  # two prompts of one name: the later one is marked
                    first = next(t for t in jobs if safe_name(t) == name)
                    name = name if first == text else f"{name}-{digest(text)}"
                    path = out / f"{name}{mark}-{k}.mp4"
                video = run_pipeline(pipe, config, jobs[text], seed + k, **how)
                write_video(path, (video * 255).round().astype("uint8"), config.fps)

        if prompts:
            make_folder(out)
        if compare:  # before the adapter is in
            draw("-28-steps", num_inference_steps=28)
        load_generator(pipe, tensors, info, lora_scale)
        draw(sigmas=info["sigmas"][:-1])
        return f"wrote {out}" if prompt else f"{len(jobs) * videos_per_prompt} videos in {out}"


# ---- videos and LoRA files out -------------------------------------------------------------------


def run_pipeline(pipe, config, cond, seed, output_type="np", **how):
    """One video (T, H, W, 3) in [0, 1] out of the stock pipeline; the seed decides it wholly."""
    torch.manual_seed(seed)  # NOTE silent: the scheduler renoises from the global generator
    mask = torch.ones(cond["prompt_embeds"].shape[:2], device=pipe.device)
    return pipe(
        prompt_embeds=cond["prompt_embeds"], pooled_prompt_embeds=cond["pooled"],
        prompt_attention_mask=mask, height=config.height, width=config.width,
        num_frames=config.frames, guidance_scale=config.embedded_guidance,
        generator=torch.Generator().manual_seed(seed), output_type=output_type, **how,
    ).frames[0]  # fmt: skip


def refuse_random(config):
    """Sampling and exporting want a model that has learnt something."""
    if config.weights == "random":
        raise Refused(f"{config.out} was made with --weights random, to measure: nothing to show.")


def load_generator(pipe, tensors, info, scale=1.0):
    """Put the generator into a stock pipeline, with the scheduler of its few steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    # NOTE silent: sigmas are shifted already; a scheduler with a shift would shift them again
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    if info["kind"] == "full":
        pipe.transformer.load_state_dict(tensors)
        return
    pipe.load_lora_weights(dict(tensors), adapter_name="generator")
    pipe.set_adapters("generator", scale)


# HunyuanVideo's own layers, as ComfyUI names them, out of diffusers' parts
ORIGINAL = {
    "transformer_blocks": ("double_blocks", {
        "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "img_attn_proj": ("attn.to_out.0",),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn_proj": ("attn.to_add_out",),
        "img_mlp.fc1": ("ff.net.0.proj",), "img_mlp.fc2": ("ff.net.2",),
        "txt_mlp.fc1": ("ff_context.net.0.proj",), "txt_mlp.fc2": ("ff_context.net.2",),
    }),
    "single_transformer_blocks": ("single_blocks", {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",),
    }),
}  # fmt: skip


def to_comfyui(tensors, mlp):
    """The adapter under the original names. Fused layers: A stacked, B block-diagonal, exact.

    mlp: rows of proj_mlp, which stay 0 in linear1 where the adapter leaves that part alone.
    """
    converted = {}
    layers = {name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name}
    for layer in sorted(layers):
        _, kind, i, part = layer.split(".", 3)
        theirs, fused = ORIGINAL[kind]
        target, parts = next((t, parts) for t, parts in fused.items() if part in parts)
        if f"diffusion_model.{theirs}.{i}.{target}.lora_A.weight" in converted:
            continue
        names = [f"transformer.{kind}.{i}.{p}" for p in parts]
        A = [tensors[f"{n}.lora_A.weight"] for n in names if n in layers]
        B = [tensors[f"{n}.lora_B.weight"] for n in names if n in layers]
        if len(B) < len(parts):
            B.append(torch.zeros(mlp, 0))
        converted[f"diffusion_model.{theirs}.{i}.{target}.lora_A.weight"] = torch.cat(A)
        converted[f"diffusion_model.{theirs}.{i}.{target}.lora_B.weight"] = torch.block_diag(*B)
    return converted


def export(run, format, out):
    """Write a run's generator for diffusers, ComfyUI or as a whole transformer, with a card."""
    config, (tensors, info), out = read_run(run), read_generator(run), Path(out)
    if config.model != "hunyuan":
        raise Refused(f"Only runs of --model hunyuan are exported, not of {config.model}.")
    if info["kind"] == "full" and format != "merged":
        raise Refused("A generator trained in full is no LoRA: use --format merged.")
    refuse_random(config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out} is in use: name a new folder as --out.")
    run_task = task(config)
    run_task.check_generator(tensors)
    make_folder(out)
    if format == "merged":
        pipe = hunyuan_pipeline(config, (*TEXT, "vae"))
        load_generator(pipe, tensors, info)
        if info["kind"] == "lora":
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        pipe.transformer.save_pretrained(out)
    elif format == "comfyui":
        sizes = run_task.backbone.module.config
        mlp = int(sizes.num_attention_heads * sizes.attention_head_dim * sizes.mlp_ratio)
        write_safetensors(out / "w2svd_comfyui.safetensors", to_comfyui(tensors, mlp), info)
    else:
        lora = {"r": info["rank"], "lora_alpha": info["lora_alpha"],
                "target_modules": run_task.backbone.lora_targets}  # fmt: skip
        adapter = json.dumps({f"transformer.{name}": value for name, value in lora.items()})
        path = out / "pytorch_lora_weights.safetensors"
        write_safetensors(path, tensors, info, lora_adapter_metadata=adapter)
    (out / "README.md").write_text(card(run, config, info, format), errors="backslashreplace")
    print(f"wrote {out}, for {format}")
    return 0


CARD = """---
base_model: {checkpoint}
library_name: diffusers
license: other
tags: [text-to-video, step-distillation, w2svd]
---
# A {steps}-step HunyuanVideo, distilled by W2SVD

Weak-to-strong distribution matching (arXiv 2503.13319), trained with w2svd. The licence of the base
model, {checkpoint}, goes for these weights too.

| | |
|---|---|
| format | {format} |
| sigmas | {sigmas} (shift {shift}; give them to a scheduler of shift 1 with stochastic_sampling) |
| embedded guidance | {embedded_guidance} |
| alpha_weak, alpha_strong | {alpha_weak}, {alpha_strong} |
| generator | {what} |
| trained for | {step} generator updates, seed {seed} |
| data | {trained_on} |
| latents at the end of training | {measured} |

{use}

    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    torch.manual_seed(0)  # the renoising draws from torch's global generator
    pipe(prompt, sigmas={path}, guidance_scale={embedded_guidance}, height={height},
         width={width}, num_frames={frames}, generator=torch.Generator().manual_seed(0))
"""
USE = {
    "diffusers": "With diffusers' HunyuanVideoPipeline of the base model:\n\n"
                 "    pipe.load_lora_weights(\"this folder\")",
    "comfyui": "Load it as a LoRA at strength 1 and sample on the sigmas above, with fresh noise "
               "at each; in diffusers the format of that name does the same:",
    "merged": "With diffusers' HunyuanVideoPipeline, this folder as its transformer:\n\n"
              "    pipe.transformer = HunyuanVideoTransformer3DModel.from_pretrained(\"folder\")",
}  # fmt: skip


def card(run, config, info, format):
    """The model card: base, licence, grid, how to sample, which data, what was measured."""
    try:
        index = read_index(config.data)
        size = f"clips of {config.frames} frames of {config.height} x {config.width}"
        kind = size if index["settings"]["shape"] else "captions without clips"
        trained_on = f"{len(index['clips'])} {kind}, from {config.data}"
    except Refused:
        index, trained_on = None, f"{config.data}, which was not there at the export"
    own = ("gen", "data") if index and index["settings"]["shape"] else ("gen",)
    try:
        student = json.loads(read_text(Path(run) / "result.json"))["student"]
        measured = {name: round(x, 4) for name, x in student.items() if name.startswith(own)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        measured = {}
    adapter = f"LoRA of rank {info['rank']}, alpha {info['lora_alpha']}"
    return CARD.format(**dataclasses.asdict(config) | info | {
        "format": format, "trained_on": trained_on, "use": USE[format],
        "what": adapter if info["kind"] == "lora" else "all weights", "path": info["sigmas"][:-1],
        "measured": measured or "not measured",
    })  # fmt: skip


def check_clips(config):
    """Refuse sizes and templates that HunyuanVideo cannot take."""
    if config.height < 1 or config.width < 1 or config.height % 16 or config.width % 16:
        raise Refused(f"--height and --width must be multiples of 16, not {config.height} and "
                      f"{config.width}.")  # fmt: skip
    if config.frames < 5 or config.frames % 4 != 1:
        raise Refused(f"--frames must be 4 k + 1, as 61 or 129, not {config.frames}.")
    if config.frames * config.height * config.width > 2**28:
        raise Refused(f"{config.frames} frames of {config.height} x {config.width} are too many: "
                      "two times 129 of 720 x 1280 are about the most.")  # fmt: skip
    if not 0 <= config.embedded_guidance <= 100 or not 0 <= config.prompt_crop_start <= 1000:
        raise Refused("--embedded-guidance must lie in [0, 100], --prompt-crop-start in [0, 1000].")
    braces = re.sub(r"[^{}]", "", config.prompt_template)
    if braces not in ("", "{}") or config.prompt_template and "{}" not in config.prompt_template:
        raise Refused("--prompt-template must contain {} once, where the prompt goes, and no other "
                      "brace.")  # fmt: skip


def task(config):
    """HunyuanVideo with the data that config.data names."""
    check_clips(config)
    return Task(config)
