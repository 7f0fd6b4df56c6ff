"""Tokenizers: every loader's files, and words that fit the text encoder and one another."""

import pytest

from edgedistill.stock import LOADERS

TEXT, WORDS, MERGES = "text_encoder/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"
GRAPH = "tokenizer/openvino_tokenizer.xml"
RESOURCES = "coreml/Resources/merges.txt"
# fmt: off
ERRORS = [
    *(({f"tokenizer/{file}": ...}, "sd", LOADERS[:3], f"tokenizer/{file}", "tokenizer", "no such file") for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")),
    *(({f"tokenizer_2/openvino_tokenizer.{end}": ...}, "sdxl", ["genai"], f"tokenizer_2/openvino_tokenizer.{end}", "an OpenVINO model", "no such file") for end in ("xml", "bin")),
    ({GRAPH: "text i64 B -> ids i64 B,n"}, "sd", ["genai"], GRAPH, "`input_ids`", "outputs ids"),
    ({TEXT: {"vocab_size": 4}}, "sd", LOADERS[:3], WORDS, "at most 4", "5"),
    ({WORDS: {"<|endoftext|>": ...}}, "sd", LOADERS[:3], WORDS, "<|endoftext|>", "no such word"),
    ({MERGES: "#version: 0.2\na b\nb b\n"}, "sd", LOADERS[:3], MERGES, "a word of vocab.json", "1 others, such as 'b b'"),
    *(({f"coreml/Resources/{file}": ...}, "sd", ["swift"], f"coreml/Resources/{file}", "tokenizer", "no such file") for file in ("vocab.json", "merges.txt")),
    ({RESOURCES: "#version: 0.2\n"}, "sd", ["swift"], RESOURCES, "the bytes of tokenizer/merges.txt", "others"),
]
# fmt: on


@pytest.mark.parametrize("case", ERRORS)
def test_a_tokenizer_that_lacks_a_file_or_does_not_fit_is_found(assert_found, case):
    assert_found("error", case)
