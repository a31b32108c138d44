"""Pretrain a small ViT on digits drawn from fonts, in the format of scikit-learn's `load_digits`.

    python -m fedlora.models.vit_digits.pretrain [--out FOLDER] [--seed 0] [--steps 2000]

    font glyph → centre line → bend → pen → NIST: 20 x 32 box, stroke, slant → count 4 x 4 blocks → 8 x 8
                               └─ random ─┘   └─ fixed: what was done to the real digits ──────────────┘

No real digit takes part in training, model selection or stopping: the recipe was fixed beforehand, the last
step is what is kept, and the real digits are read once, after the weights are on disk, to print one line.

Pixels: the dataset counts 0..16; the model reads float32 (B, 1, 8, 8) = (count / 16 - 0.5) / 0.5, in [-1, 1].

The real digits were normalised by NIST's programs (Garris et al., NISTIR 5469, 1994), whose source is public:
the bounding box is stretched to 20 x 32 (not 32 x 32), centred in 32 x 32, eroded or dilated by its number of
on-pixels, and sheared until its left edge is upright. `normalise` does the same, so that printed and written
digits meet in one format.
"""

import argparse
import math
import os
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from scipy.ndimage import distance_transform_edt, gaussian_filter
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils.logging import disable_progress_bar

# Whole designs, or styles of one, that training never sees: the synthetic validation.
HELD_OUT = ("DejaVuSerif-Bold", "STIXGeneralItalic", "cmss10", "cmtt10")
# DejaVu Sans Mono puts a dot into its zero, which few do by hand; its other digits are those of DejaVu Sans.
SKIPPED = ("DejaVuSansMono",)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

CANVAS, HEIGHT = 72, 44  # pixels: a digit is HEIGHT tall and keeps room to turn and lean
BLURS = (0.0, 0.75, 1.5)  # pixels: how rounded the corners are
BATCH, RATE, DECAY, WARMUP = 256, 1e-3, 0.05, 0.05


def digit_fonts() -> dict[str, Path]:
    """The fonts that matplotlib ships and that draw all ten digits, by file name.

    A character map is not enough: cmsy10 has a prime at "0", LastResort one placeholder everywhere.
    So each glyph must also carry its digit's name; "zerooldstyle" in cmmi10 counts, it is still that digit.
    """
    fonts = {}
    for path in sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")):
        font = FT2Font(path)
        glyphs = font.get_charmap()
        drawn = all(
            ord(str(digit)) in glyphs and font.get_glyph_name(glyphs[ord(str(digit))]).startswith(name)
            for digit, name in enumerate(NAMES)
        )
        if drawn and not path.stem.startswith(SKIPPED):
            fonts[path.stem] = path
    return fonts


def thin(ink: np.ndarray) -> np.ndarray:
    """Peel shapes to centre lines one pixel wide (Zhang and Suen, 1984): bool (N, H, W) → bool (N, H, W)."""
    peeling = True
    while peeling:
        peeling = False
        for facing in ((0, 2, 4, 6), (4, 6, 0, 2)):  # south-east edges first, then north-west ones
            p = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
            n, ne, e, se = p[:, :-2, 1:-1], p[:, :-2, 2:], p[:, 1:-1, 2:], p[:, 2:, 2:]
            s, sw, w, nw = p[:, 2:, 1:-1], p[:, 2:, :-2], p[:, 1:-1, :-2], p[:, :-2, :-2]
            ring = np.stack([n, ne, e, se, s, sw, w, nw])
            count, runs = ring.sum(0), (ring & ~np.roll(ring, 1, 0)).sum(0)
            a, b, c, d = ring[list(facing)]
            edge = ink & (count >= 2) & (count <= 6) & (runs == 1) & ~(b & c & (a | d))
            ink = ink & ~edge
            peeling |= bool(edge.any())
    return ink


def centre_distances(paths: list[Path]) -> Tensor:
    """The distance to the centre line of each font's digits, in pixels: (fonts * blurs, 10, CANVAS, CANVAS).

    A printed stroke swells and thins, one made with a ballpoint does not: so only the centre line of a glyph
    is kept. On distances to it a pen is a threshold; they bend smoothly; blurring them rounds corners.
    """
    pages = np.zeros((len(paths), 10, CANVAS, CANVAS), bool)
    for i, path in enumerate(paths):
        font = FT2Font(path)
        for digit in range(10):
            font.set_size(HEIGHT, 72)
            font.set_text(str(digit))
            tall = font.get_width_height()[1] / 64
            font.set_size(HEIGHT * HEIGHT / tall, 72)  # every digit equally tall, old-style figures too
            font.set_text(str(digit))
            font.draw_glyphs_to_bitmap()
            ink = np.asarray(font.get_image()) > 127
            top, left = (CANVAS - ink.shape[0]) // 2, (CANVAS - ink.shape[1]) // 2
            pages[i, digit, top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    lines = thin(pages.reshape(-1, CANVAS, CANVAS))
    sharp = np.stack([distance_transform_edt(~line) for line in lines]).reshape(pages.shape)
    blurred = [gaussian_filter(sharp, blur, axes=(2, 3)) for blur in BLURS]
    return torch.from_numpy(np.concatenate(blurred).astype(np.float32))


def write(distances: Tensor, stream: torch.Generator) -> Tensor:
    """Bend centre lines, follow them with a pen, both at random: (B, CANVAS, CANVAS) → bool ink, same shape.

    Rotation, shear, aspect and a smooth elastic field move the line; the pen has a random width and an uneven
    pressure. Place and size are left alone: the bounding box would undo both.
    """
    count = len(distances)

    def uniform(low: float, high: float) -> Tensor:  # (B, 1, 1, 1)
        return (torch.rand(count, generator=stream) * (high - low) + low).view(-1, 1, 1, 1)

    angle, lean, aspect = (uniform(-x, x).flatten() for x in (0.25, 0.35, 0.3))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(count)
    turn = torch.stack([cos, -sin, sin, cos], 1).view(count, 2, 2)
    slant = torch.stack([aspect.exp(), lean, zero, zero, zero + 1, zero], 1).view(count, 2, 3)
    grid = F.affine_grid(turn @ slant, [count, 1, CANVAS, CANVAS], align_corners=False)

    # One smooth field of three channels: how far the line moves in x and y, and how hard the pen presses.
    between = F.interpolate(torch.eye(5)[None, None], (CANVAS, 5), mode="bicubic", align_corners=True)
    smooth = between @ torch.randn(count, 3, 5, 5, generator=stream) @ between.mT
    bend = smooth[:, :2] * uniform(0.5, 3.0) * (2 / CANVAS)  # pixels, in grid units: the canvas is [-1, 1]
    grid = grid + bend.permute(0, 2, 3, 1)

    bent = F.grid_sample(distances[:, None], grid, padding_mode="border", align_corners=False)
    radius = uniform(2.0, 4.5) * (1 + 0.12 * smooth[:, 2:])
    return (bent < radius)[:, 0]


def normalise(ink: Tensor) -> Tensor:
    """What NIST's programs and the dataset's authors did: bool ink (B, H, W) → counts 0..16, (B, 8, 8)."""
    return count_blocks(upright(even_stroke(fit_box(ink))))


def fit_box(ink: Tensor) -> Tensor:
    """Stretch the bounding box of (B, H, W) to 20 wide and 32 tall, centred: (B, 32, 32)."""

    def samples(on: Tensor, size: int) -> Tensor:  # on (B, length): has ink? → where to look, (B, size)
        first = on.int().argmax(1, keepdim=True)
        past = on.shape[1] - on.flip(1).int().argmax(1, keepdim=True)
        return first + ((torch.arange(size) + 0.5) / size * (past - first)).long()

    rows, columns = samples(ink.any(2), 32), samples(ink.any(1), 20)
    each = torch.arange(len(ink))[:, None, None]
    return F.pad(ink[each, rows[:, :, None], columns[:, None, :]], (6, 6))


def even_stroke(ink: Tensor) -> Tensor:
    """Erode heavy, dilate faint digits, once or twice, by NIST's limits on on-pixels: (B, 32, 32) → same."""

    def neighbours(x: Tensor) -> Tensor:  # the four that touch a side; off beyond the edge: (4, B, 32, 32)
        p = F.pad(x, (1, 1, 1, 1))
        return torch.stack([p[:, :-2, 1:-1], p[:, 2:, 1:-1], p[:, 1:-1, :-2], p[:, 1:-1, 2:]])

    def erode(x: Tensor) -> Tensor:
        return x & neighbours(x).all(0)

    def dilate(x: Tensor) -> Tensor:
        return x | neighbours(x).any(0)

    weight = ink.sum((1, 2))[:, None, None]
    lighter, heavier = erode(ink), dilate(ink)
    lighter = torch.where(weight > 560, erode(lighter), lighter)
    heavier = torch.where(weight < 108, dilate(heavier), heavier)
    return torch.where(weight > 412, lighter, torch.where(weight < 256, heavier, ink))


def upright(ink: Tensor) -> Tensor:
    """Shear until the left edge near the top stands above that near the bottom: (B, 32, 32) → same."""
    each, row = torch.arange(len(ink)), torch.arange(32)
    on = ink.any(2).int()
    top = (on.argmax(1) + 2).clamp(max=31)  # two rows in: the very edge is noise
    bottom = (31 - on.flip(1).argmax(1) - 2).clamp(min=0)
    left = ink.int().argmax(2)  # (B, 32): leftmost ink of each row
    found = ink[each, top].any(1) & ink[each, bottom].any(1) & (bottom > top)
    slope = (left[each, top] - left[each, bottom]) / (bottom - top).clamp(min=1) * found
    shift = ((row - 16) * slope[:, None]).round().long()  # (B, 32): columns to the right
    source = row.view(1, 1, 32) - shift[:, :, None]
    return ink.gather(2, source.clamp(0, 31)) & (source >= 0) & (source <= 31)


def count_blocks(ink: Tensor) -> Tensor:
    """Count the on-pixels in blocks of 4 x 4: (B, 32, 32) → integers 0..16, (B, 8, 8)."""
    return ink.view(-1, 8, 4, 8, 4).sum((2, 4))


def pixels(counts: Tensor) -> Tensor:
    """Counts 0..16, (B, 8, 8) → what the model reads: float32 in [-1, 1], (B, 1, 8, 8)."""
    return ((counts.float() / 16 - 0.5) / 0.5)[:, None]


def draw(distances: Tensor, count: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Synthetic digits from (fonts * blurs, 10, CANVAS, CANVAS): pixels (B, 1, 8, 8) and labels (B,)."""
    hand = torch.randint(len(distances), (count,), generator=stream)
    digit = torch.randint(10, (count,), generator=stream)
    return pixels(normalise(write(distances[hand, digit], stream))), digit


def new_model(seed: int) -> ViTForImageClassification:
    """The untrained ViT: 16 patches of 2 x 2, 4 layers, width 64, no dropout, no pooler."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    with torch.random.fork_rng():  # transformers draws initial weights from the global stream
        torch.manual_seed(seed)
        return ViTForImageClassification(config)


def train(model: ViTForImageClassification, distances: Tensor, steps: int, stream: torch.Generator) -> None:
    """AdamW, linear warm-up then cosine to zero; every batch is drawn afresh, so no example is seen twice."""

    def rate(step: int) -> float:
        done = step / steps
        return min(done / WARMUP, 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - WARMUP) / (1 - WARMUP)))

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step in range(1, steps + 1):
        images, labels = draw(distances, BATCH, stream)
        loss = F.cross_entropy(model(pixel_values=images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            print(f"step {step:5d}/{steps}  loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    """The share of images (B, 1, 8, 8) whose largest logit is their label (B,)."""
    model.eval()
    return float((model(pixel_values=images).logits.argmax(1) == labels).float().mean())


def save(model: ViTForImageClassification, folder: Path) -> None:
    """Write config.json and model.safetensors whole or not at all: a reader never meets half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        model.save_pretrained(scratch)
        for name in ("config.json", "model.safetensors"):
            Path(scratch, name).chmod(0o644)  # the weights come out readable by their owner alone
            os.replace(Path(scratch, name), folder / name)


def main() -> None:
    """Draw, train, save, and only then measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="batches of 256 (default: 2000)")
    settings = parser.parse_args()

    disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)  # a sum depends on how it is split: always in two, whatever the machine has
    start = time.perf_counter()

    fonts = digit_fonts()
    unseen = centre_distances([fonts.pop(name) for name in HELD_OUT])
    seen = centre_distances(list(fonts.values()))
    print(f"{len(fonts)} fonts to train on, {len(HELD_OUT)} held out: {', '.join(HELD_OUT)}", flush=True)

    model = new_model(settings.seed)
    train(model, seen, settings.steps, torch.Generator().manual_seed(settings.seed + 1))
    save(model, settings.out)

    synthetic = accuracy(model, *draw(unseen, 5000, torch.Generator().manual_seed(settings.seed + 2)))
    print(f"held-out fonts, 5,000 synthetic digits: {synthetic:.1%}  ({time.perf_counter() - start:.0f} s)")

    from sklearn.datasets import load_digits  # here, so that nothing above can reach a real digit

    real = load_digits()
    measured = accuracy(model, pixels(torch.from_numpy(real.images)), torch.from_numpy(real.target))
    print(f"real digits, all 1,797, measured once, never used: {measured:.1%}")


if __name__ == "__main__":
    main()
