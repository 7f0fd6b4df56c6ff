"""Train the packaged text teacher from scratch: digits from sentences, with the text encoder trained along.

About two minutes on one core. The same seed gives the same bytes on the same versions of the packages and
the same kind of processor::

    python examples/train_captioned_digits_teacher.py -o my_teacher   # train, write, print figures
    python examples/train_captioned_digits_teacher.py --check         # train again, compare with the packaged files
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from tokenizers import Tokenizer as Words
from tokenizers import normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from edgedistill.data.captions import NAMES, TEMPLATES, caption
from edgedistill.data.digits import load_digits
from edgedistill.evaluation.report import Evaluator
from edgedistill.files import write_bytes, write_json
from edgedistill.models import store
from edgedistill.models.parts import PROMPTS
from edgedistill.models.text import TextEncoder
from edgedistill.teacher import PACKAGED, Teacher
from edgedistill.text import Tokenizer
from teachers import BATCH, build_scheduler, fit, run, stratified_times, write_scheduler

SHIPPED = PACKAGED["captioned_digits"]
LENGTH, DIM = 12, 32  # tokens per prompt, numbers per token
PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[START]", "[END]"
CAPTION_DROP = 0.12


def build_words() -> Words:
    """Return a tokenizer of one number per word that occurs in a training caption."""
    texts = " ".join([*TEMPLATES["train"], *NAMES]).replace("{}", "").split()
    tokens = [PAD, UNKNOWN, START, *sorted(set(texts)), END]
    words = Words(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    words.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, words.token_to_id(token)) for token in (START, END)]
    words.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=ends
    )
    words.add_special_tokens([PAD, UNKNOWN, START, END])
    words.enable_truncation(LENGTH)
    words.enable_padding(length=LENGTH, pad_id=words.token_to_id(PAD), pad_token=PAD)
    return words


def build_text_encoder(words: Words) -> TextEncoder:
    """Return the untrained text encoder of two layers."""
    config = CLIPTextConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=DIM,
        intermediate_size=2 * DIM,
        projection_dim=DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        pad_token_id=words.token_to_id(PAD),
        bos_token_id=words.token_to_id(START),
        eos_token_id=words.token_to_id(END),
    )
    return TextEncoder(CLIPTextModel(config))


def build_network() -> UNet2DConditionModel:
    """Return the untrained network: 252497 parameters, cross-attention at 4x4."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=DIM,
        attention_head_dim=4,  # the number of heads, whatever its name says
    )


class Prompts:
    """Token numbers of every training caption, and of the empty one."""

    def __init__(self, words: Words) -> None:
        count = len(TEMPLATES["train"])
        texts = [caption(digit, i) for digit in range(len(NAMES)) for i in range(count)]
        tokens = [item.ids for item in words.encode_batch([*texts, ""])]
        self._tokens, self._count = torch.tensor(tokens), count

    def draw(self, labels: Tensor, draw: torch.Generator) -> Tensor:
        """Return a caption of each digit, by a template that is drawn; sometimes the empty one."""
        templates = torch.randint(self._count, labels.shape, generator=draw)
        dropped = torch.rand(labels.shape, generator=draw) < CAPTION_DROP
        return self._tokens[(labels * self._count + templates).masked_fill(dropped, -1)]


def train(words: Words, steps: int, seed: int) -> tuple[UNet2DConditionModel, TextEncoder]:
    """Train and return network and text encoder with their averaged weights."""
    torch.manual_seed(seed)
    network, encoder = build_network().train(), build_text_encoder(words).train()
    parameters = [*network.parameters(), *encoder.parameters()]
    fit(parameters, losses(network, encoder, Prompts(words), seed), steps)
    return network.eval(), encoder.eval()


def losses(
    network: nn.Module, encoder: TextEncoder, prompts: Prompts, seed: int
) -> Iterator[Tensor]:
    """Yield the mean squared error in v on random images, noise, captions and stratified times, without end."""
    draw, scheduler, data = torch.Generator().manual_seed(seed), build_scheduler(), load_digits()
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    while True:
        chosen = torch.randint(len(images), (BATCH,), generator=draw)
        x = images[chosen]
        noise = torch.randn(x.shape, generator=draw)
        t = stratified_times(scheduler, draw)
        text, _ = encoder(prompts.draw(labels[chosen], draw))
        z, v = scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)
        inputs = {"sample": z, "timestep": t, "encoder_hidden_states": text}
        yield functional.mse_loss(store.call(network, inputs), v)


def write(network: nn.Module, encoder: TextEncoder, words: Words, folder: Path) -> None:
    """Write a diffusers folder with weights in half precision."""
    store.save(network, folder / "unet", dtype=torch.float16)
    store.save(encoder, folder / "text_encoder", dtype=torch.float16)
    Tokenizer(words).save(folder / "tokenizer" / "tokenizer.json")
    special = {"pad_token": PAD, "unk_token": UNKNOWN, "bos_token": START, "eos_token": END}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LENGTH}
    write_json(folder / "tokenizer" / "tokenizer_config.json", {**kind, **special})
    examples = [caption(digit, 0) for digit in range(len(NAMES))]
    write_bytes(folder / PROMPTS, "".join(f"{text}\n" for text in examples).encode())
    write_scheduler(folder)


def print_figures(folder: Path) -> None:
    """Measure 1000 samples at several numbers of steps, guided or not, with seen and held-out templates."""
    teacher, evaluator = Teacher.open(folder), Evaluator.open("captioned_digits")
    digits = np.arange(1000) % len(NAMES)
    print("steps    w  templates  Frechet  recall  diversity  memorisation  accuracy")
    for steps, w, split in itertools.product((50, 8, 4, 2, 1), (0.5, 0.0), TEMPLATES):
        prompts = [caption(int(digit), i // len(NAMES), split) for i, digit in enumerate(digits)]
        samples = teacher.sample(teacher.table(steps, 1 + w), 1000, encoder_hidden_states=prompts)
        report = evaluator.report(samples, digits)
        print(
            f"{steps:5} {w:4}  {split:9} {report.frechet:8.3f} {report.recall:7.3f} "
            f"{report.diversity:10.3f} {report.memorisation:13.3f} {report.accuracy:9.3f}"
        )


def main() -> int:
    """Train, then write and measure, or compare."""
    words = build_words()
    return run(
        __doc__.split("\n", maxsplit=1)[0],
        600,
        SHIPPED,
        lambda steps, seed: train(words, steps, seed),
        lambda made, folder: write(*made, words, folder),
        print_figures,
    )


if __name__ == "__main__":
    sys.exit(main())
