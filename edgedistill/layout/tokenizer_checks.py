"""Checks of tokenizers: the files that each loader reads, and that they fit one another."""

from collections.abc import Iterator

from .findings import Finding, check
from .folder import RESOURCES, Folder

START, END = "<|startoftext|>", "<|endoftext|>"
_COPY = "copy the tokenizer's files from the pipeline that was exported"
_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def _tokenizers(folder: Folder) -> list[str]:
    """Return the folders of CLIP tokenizers."""
    return [
        name for name, (_, kind) in folder.entries.items() if str(kind).startswith("CLIPTokenizer")
    ]


@check("diffusers", "ort", "openvino")
def tokenizer_files(folder: Folder, _: str) -> Iterator[Finding]:
    """A CLIP tokenizer has its files, and every word that it knows a row of the embedding."""
    for name in _tokenizers(folder):
        for file in _FILES:
            if not folder.has(f"{name}/{file}"):
                yield Finding(f"{name}/{file}", "a file of the tokenizer", "no such file", _COPY)
        yield from _vocabulary(folder, name)
        encoder = name.replace("tokenizer", "text_encoder")
        rows = folder.config(encoder).get("vocab_size")
        known = folder.json(f"{name}/vocab.json")
        if isinstance(rows, int) and len(known) > rows:
            yield Finding(
                f"{name}/vocab.json",
                f"at most {rows} words, the `vocab_size` of {encoder}",
                str(len(known)),
                "take the tokenizer that the encoder was trained with",
            )


@check("genai")
def openvino_tokenizer(folder: Folder, _: str) -> Iterator[Finding]:
    """openvino.genai loads without a tokenizer of its own and fails at the first prompt."""
    for name in _tokenizers(folder):
        for file in ("openvino_tokenizer.xml", "openvino_tokenizer.bin"):
            if not folder.has(f"{name}/{file}"):
                yield Finding(
                    f"{name}/{file}",
                    "a tokenizer as an OpenVINO model",
                    "no such file",
                    'run pip install "edgedistill[interop]" and export again with --overwrite',
                )
        graph = folder.graph(f"{name}/openvino_tokenizer.xml")
        outputs = [item.name for item in graph.outputs] if graph else ["input_ids"]
        if "input_ids" not in outputs:
            yield Finding(
                f"{name}/openvino_tokenizer.xml",
                "output `input_ids`",
                f"outputs {', '.join(outputs) or 'none'}",
                "export again with --overwrite",
            )


@check("swift")
def swift_tokenizer(folder: Folder, _: str) -> Iterator[Finding]:
    """Swift reads one vocabulary beside the compiled models; it is that of the pipeline."""
    for file in ("vocab.json", "merges.txt"):
        path, source = f"{RESOURCES}/{file}", f"tokenizer/{file}"
        if not folder.has(path):
            yield Finding(path, "the tokenizer's file", "no such file", f"copy {source}")
        elif folder.has(source) and not _same(folder, path, source):
            yield Finding(path, f"the bytes of {source}", "others", f"copy {source}")
    yield from _vocabulary(folder, RESOURCES)


def _same(folder: Folder, first: str, second: str) -> bool:
    return (folder.root / first).read_bytes() == (folder.root / second).read_bytes()


def _vocabulary(folder: Folder, place: str) -> Iterator[Finding]:
    """The marks of a prompt's ends are known, and what each merge makes of two words is one."""
    vocabulary = folder.json(f"{place}/vocab.json")
    merges = folder.root / place / "merges.txt"
    if not vocabulary or not merges.is_file():
        return
    for word in (START, END):
        if word not in vocabulary:
            yield Finding(f"{place}/vocab.json", f"the word {word}", "no such word", _COPY)
    lines = merges.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    bad = [pair for pair in pairs if len(pair) != 2 or "".join(pair) not in vocabulary]
    if bad:
        yield Finding(
            f"{place}/merges.txt",
            "pairs whose merger is a word of vocab.json",
            f"{len(bad)} others, such as {' '.join(bad[0])!r}",
            _COPY,
        )
