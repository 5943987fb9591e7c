"""A teacher with another tokenizer: SmolLM2's as the base's, Mistral's as the teacher's."""

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline import read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import Manifest, read_manifest
from qpipe.pipeline.folders.provenance import tokenizer_hash
from qpipe.pipeline.format.records import ScoredExample, TargetExample
from qpipe.pipeline.methods import choose
from qpipe.pipeline.targets.translation import mapped_shares
from qpipe.stages.build_targets import other_tokenizer
from qpipe.stages.build_targets.compare_methods import compare_methods
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.demonstrations.demonstration import Demonstration
from qpipe.stages.encoding.encoder import Encoded, Encoder
from qpipe.tests.support.commands import run_qpipe
from qpipe.tests.support.examples import scored
from qpipe.tests.support.folders import in_shards, seal_shards
from qpipe.tests.support.tokenizers import ROOT, SMOLLM, smollm
from tokenizers import AddedToken
from transformers import AutoTokenizer

from .made import by_position, folder_bytes, supports_of

SIZES = {"base": 49152, "teacher": 32000}  # of the vocabularies


def chats() -> list[tuple[str, str]]:
    """Questions and answers in English, with lists, code and quotes."""
    text = (ROOT / "docs" / "faq.md").read_text()
    found = re.findall(r"\*\*(.*?)\*\* (.*?)(?=\n\n\*\*|\Z)", text, re.DOTALL)
    assert len(found) > 10
    return [*found[:6], ("Say it in Czech", "Dobrý den, jak se máš? 👩‍🚀 e\u0301")]


def encoded(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Any]:
    encoder = Encoder(tokenizer, tokenizer.chat_template, 4096)
    examples = []
    for number, (question, answer) in enumerate(pairs):
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        found = encoder.encode(Demonstration(f"faq:{number}", messages, None, "faq", number + 1))
        assert isinstance(found, Encoded)
        examples.append(found.example)
    return examples


def under_a_model(example: Any, vocab_size: int, seed: int) -> ScoredExample:
    """Random scores of eight ids a position and, now and then, not the observed one."""
    rng = np.random.default_rng((seed, len(example.input_ids)))
    supports = []
    for observed in example.observed_ids.tolist():
        ids = dict.fromkeys([observed, *rng.integers(3, vocab_size, 7).tolist()])
        probs = 0.99 * rng.dirichlet(np.full(len(ids) + 1, 0.5)) + 0.01 / (len(ids) + 1)
        supports.append(dict(zip(ids, probs.tolist(), strict=False)))
    of = example.id, example.input_ids.tolist(), supports
    return scored(*of, positions=example.positions.tolist())


def without_observed(example: ScoredExample) -> ScoredExample:
    """The scores without the observed token among the entries."""
    is_observed = example.topk_ids == np.repeat(example.observed_ids, example.counts)
    return replace(
        example,
        counts=example.counts - 1,
        topk_ids=example.topk_ids[~is_observed],
        topk_log_probs=example.topk_log_probs[~is_observed],
        tail_mass=(example.tail_mass + np.exp(example.observed_log_probs)).astype(np.float32),
    )


def folder_of(folder: Path, rows: Sequence[ScoredExample], hash: str, name: str) -> Path:
    settings = {"vocab_size": SIZES[name], "tokenizer_hash": hash, "top_k": 8}
    seal_shards(folder, "score", settings, in_shards(rows, 4), inputs={"of": folder.name})
    return folder


@pytest.fixture(autouse=True, scope="module")
def _read_once() -> Iterator[None]:
    """A tokenizer is read, hashed and spelt out once, which takes seconds."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("load_tokenizer", "tokenizer_hash", "vocabulary_of"):
            patched.setattr(other_tokenizer, name, cache(getattr(other_tokenizer, name)))
        yield


@pytest.fixture(scope="module")
def ours() -> list[ScoredExample]:
    return [under_a_model(each, SIZES["base"], 0) for each in encoded(smollm(), chats())]


@pytest.fixture(scope="module")
def theirs(mistral: Any) -> list[ScoredExample]:
    made = [under_a_model(each, SIZES["teacher"], 1) for each in encoded(mistral, chats())]
    return [without_observed(made[0]), *made[1:]]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    ours: list[ScoredExample],
    theirs: list[ScoredExample],
    mistral: Any,
) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("other")
    base = folder_of(root / "scores", ours, tokenizer_hash(smollm()), "base")
    return base, folder_of(root / "teacher", theirs, tokenizer_hash(mistral), "teacher")


def build(
    folders: tuple[Path, Path], models: Sequence[Any], out: Path, method: str = "kd", **options: Any
) -> Manifest:
    settings = BuildSettings(
        folders[0],
        out,
        choose(method),
        (folders[1],),
        tokenizer=tuple(map(str, models)),
        **{"precision": "float32", "top_p": 1.0} | options,
    )
    build_targets(settings)
    return read_manifest(out)


# What is mapped


def test_each_mapped_probability_is_the_teachers(
    folders: tuple[Path, Path],
    ours: list[ScoredExample],
    theirs: list[ScoredExample],
    mistral: Any,
    mistral_folder: Path,
    tmp_path: Path,
) -> None:
    """The truth comes from the tokenizers' own offsets and decoding."""
    manifest = build(folders, [SMOLLM, mistral_folder], tmp_path / "targets")
    targets: list[TargetExample] = list(read_targets(tmp_path / "targets"))
    text_of = Decoded(smollm()), Decoded(mistral)
    mapped = known = mass = positions = 0.0
    for target, our, their in zip(targets, ours, theirs, strict=True):
        at = common_characters(our, their, text_of)
        their_supports = entries(their)
        base_supports = entries(our)
        for n, support in enumerate(supports_of(target)):
            positions += 1
            if n not in at:  # the base stands in for the teacher
                assert support == pytest.approx(base_supports[n], rel=1e-5)
                continue
            theirs_here = their_supports[at[n]]
            spelt = {token: text_of[1][token] for token in theirs_here}
            wanted = {text: theirs_here[token] for token, text in spelt.items()}
            mapped += 1
            known += sum(theirs_here.values())
            mass += sum(support.values())
            for token, prob in support.items():
                assert prob == pytest.approx(wanted[text_of[0][token]], rel=1e-5)
            texts = {text_of[0][token] for token in support}
            tokens = {text for token, text in spelt.items() if not text_of[1].is_byte(token)}
            assert not [text for text in tokens - texts if text_of[0].writes(text)]
    (share,) = mapped_shares(manifest.totals["sums"], manifest.totals["positions"])
    assert share.positions == mapped / positions
    assert share.positions > 0.6
    assert share.mass == pytest.approx(mass / known, rel=1e-4)
    assert (share.other_text, share.missing) == (0, 0)
    assert manifest.settings["teacher_tokenizers"] == {"teacher": tokenizer_hash(mistral)}


class Decoded:
    """The text of each token as the tokenizer decodes it after an "a"; special ones as named."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.before = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.start = len(tokenizer.decode(self.before))
        self.by_id: dict[int, str] = {}

    def __getitem__(self, number: int) -> str:
        if number not in self.by_id:
            self.by_id[number] = self._decoded(number)
        return self.by_id[number]

    def _decoded(self, number: int) -> str:
        if number in self.tokenizer.added_tokens_decoder:
            return f"special {self.tokenizer.added_tokens_decoder[number]}"
        text = self.tokenizer.decode([*self.before, number], clean_up_tokenization_spaces=False)
        # a token that is no character alone is told apart by its spelling
        return (
            text[self.start :]
            if "\ufffd" not in text
            else f"<{_bytes_of(self.tokenizer, number).hex()}>"
        )

    def is_byte(self, number: int) -> bool:
        """Whether it is one that stands for a byte beside the token of the same text."""
        return self.tokenizer.convert_ids_to_tokens(number).startswith("<0x")

    def writes(self, text: str) -> bool:
        """Whether the tokenizer writes this text, after an "a", as one token."""
        ids = self.tokenizer(f"a{text}", add_special_tokens=False)["input_ids"]
        return len(ids) == len(self.before) + 1 and self[ids[-1]] == text


def _bytes_of(tokenizer: Any, number: int) -> bytes:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    token = tokenizer.convert_ids_to_tokens(number)
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return bytes(letters.get(letter, 0) for letter in token)


def common_characters(
    our: ScoredExample, their: ScoredExample, text_of: tuple[Decoded, Decoded]
) -> dict[int, int]:
    """The supervised tokens of the same text that end as many characters before the end."""
    ends = []
    for each, texts in ((our, text_of[0]), (their, text_of[1])):
        pieces = [texts[number] for number in each.observed_ids.tolist()][:-1]  # without the end
        sizes = [len(bytes.fromhex(p[1:-1])) if _is_hex(p) else len(p.encode()) for p in pieces]
        to_go = np.cumsum(sizes[::-1])[::-1]
        ends.append(
            {
                (int(n), piece): place
                for place, (n, piece) in enumerate(zip(to_go, pieces, strict=True))
            }
        )
    return {place: ends[1][key] for key, place in ends[0].items() if key in ends[1]}


def _is_hex(piece: str) -> bool:
    return re.fullmatch(r"<([0-9a-f]{2})+>", piece) is not None


def entries(example: ScoredExample) -> list[dict[int, float]]:
    """Each position's known probabilities, the observed token's among them."""
    ids = by_position(example.counts, example.topk_ids)
    logs = by_position(example.counts, example.topk_log_probs)
    supports = [
        dict(zip(*pair, strict=True)) for pair in zip(ids, np.array(logs, object), strict=True)
    ]
    observed = zip(example.observed_ids.tolist(), example.observed_log_probs.tolist(), strict=True)
    for support, (token, log_prob) in zip(supports, observed, strict=True):
        support.setdefault(token, log_prob)
    return [{token: float(np.exp(value)) for token, value in each.items()} for each in supports]


def test_with_the_same_tokenizer_the_targets_are_those_of_the_plain_join(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A token that stands in no text makes another tokenizer of it, as far as its hash goes."""
    tiny, twin = (AutoTokenizer.from_pretrained(tiny_model) for _ in range(2))
    twin.add_tokens([AddedToken("<unused>", special=True)])
    shutil.copytree(tiny_model, tmp_path / "twin")
    twin.save_pretrained(tmp_path / "twin")
    hashes = tokenizer_hash(tiny), tokenizer_hash(twin)
    assert hashes[0] != hashes[1]
    examples = encoded(tiny, chats())
    ours, taught = ([under_a_model(each, len(tiny), seed) for each in examples] for seed in (0, 2))
    taught[1:3] = map(without_observed, taught[1:3])
    base = folder_of(tmp_path / "scores", ours, hashes[0], "base")
    plain = folder_of(tmp_path / "plain", taught, hashes[0], "base")
    other = folder_of(tmp_path / "other", taught[::-1], hashes[1], "base")

    for method in ("target-sft", "token-cleaning"):
        build((base, plain), [], tmp_path / f"{method}-plain", method)
        models = [tiny_model, tmp_path / "twin"]
        made = build((base, other), models, tmp_path / f"{method}-other", method)
        shards = [_shards(tmp_path / f"{method}-{each}") for each in ("plain", "other")]
        assert shards[0] == shards[1]
        (share,) = mapped_shares(made.totals["sums"], made.totals["positions"])
        assert (share.positions, share.mass) == (1, 1)
        plain_sums = read_manifest(tmp_path / f"{method}-plain").totals["sums"]
        assert {key: made.totals["sums"][key] for key in plain_sums} == plain_sums


def _shards(folder: Path) -> dict[str, bytes]:
    return {name: each for name, each in folder_bytes(folder).items() if name.endswith(".arrow")}


# What is not mapped


def test_rows_of_another_text_and_missing_rows_are_counted(
    ours: list[ScoredExample],
    theirs: list[ScoredExample],
    folders: tuple[Path, Path],
    mistral: Any,
    mistral_folder: Path,
    tmp_path: Path,
) -> None:
    pairs = chats()[:4]
    pairs[1] = pairs[1][0], pairs[1][1] + " Not so."
    changed = [under_a_model(each, SIZES["teacher"], 1) for each in encoded(mistral, pairs)]
    teacher = folder_of(
        tmp_path / "changed", [*changed, *theirs[5:]], tokenizer_hash(mistral), "teacher"
    )
    models = [SMOLLM, mistral_folder]
    manifest = build((folders[0], teacher), models, tmp_path / "targets")
    (share,) = mapped_shares(manifest.totals["sums"], manifest.totals["positions"])
    assert (share.other_text, share.missing) == (1, 1)
    for place in (1, 4):
        target = list(read_targets(tmp_path / "targets"))[place]
        assert [*map(set, supports_of(target))] == [*map(set, entries(ours[place]))]


def test_what_is_refused(folders: tuple[Path, Path], mistral_folder: Path, tmp_path: Path) -> None:
    both = [SMOLLM, mistral_folder]

    def refusal(models: Sequence[Any], **options: Any) -> str:
        with pytest.raises(UserError) as refused:
            build(folders, models, tmp_path / "refused", **options)
        assert not (tmp_path / "refused").exists()
        return str(refused.value)

    base, teacher = folders
    assert refusal([]).startswith(f"{teacher}: made with another tokenizer than {base}: give")
    assert f"the model of {base} with --tokenizer" in refusal([mistral_folder])
    assert "/no/model: no such folder" in refusal(["/no/model"])
    assert "leave them out" in refusal(both, teacher_temperature=2.0)
    assert "leave them out" in refusal(both, temperature=0.5)
    assert "contrast needs a teacher with the base's tokenizer" in refusal(both, method="contrast")
    with pytest.raises(UserError, match="all scores were made with one tokenizer: leave it out"):
        build((base, base), [SMOLLM], tmp_path / "refused")


def test_an_example_twice_in_another_order_is_refused(
    folders: tuple[Path, Path],
    theirs: list[ScoredExample],
    mistral: Any,
    mistral_folder: Path,
    tmp_path: Path,
) -> None:
    twice = folder_of(tmp_path / "twice", [theirs[0], *theirs], tokenizer_hash(mistral), "teacher")
    with pytest.raises(UserError, match="holds example faq:0 twice"):
        build((folders[0], twice), [SMOLLM, mistral_folder], tmp_path / "targets")


# What is told


def test_commands_tell_the_share(
    folders: tuple[Path, Path],
    theirs: list[ScoredExample],
    mistral: Any,
    mistral_folder: Path,
    tmp_path: Path,
) -> None:
    base, teacher = folders
    given = ["--teacher", teacher, "--tokenizer", SMOLLM, mistral_folder]
    made = run_qpipe("build-targets", "--scores", base, *given, "--out", tmp_path / "targets")
    shares = re.search(
        r"teacher mapped +([\d.]+)% of the tokens, ([\d.]+)% of their mass", made.out
    )
    assert shares is not None
    assert float(shares[1]) > 60
    assert f"The teacher has another tokenizer: {100 - float(shares[1]):.1f}% of" in made.out
    warned = float(shares[2]) < 50
    assert ("Warning: of the teacher only" in made.err) == warned
    seen = run_qpipe("inspect", tmp_path / "targets", "-n", "0")
    assert shares[0].split() == next(
        line.split() for line in seen.out.splitlines() if line.startswith("teacher mapped")
    )
    compared = run_qpipe("compare-methods", base, *given)
    assert "The teacher has another tokenizer" in compared.out
    assert "contrast" in compared.out.partition("Left out")[2]
    few = folder_of(tmp_path / "few", theirs[:2], tokenizer_hash(mistral), "teacher")
    given[1] = few
    made = run_qpipe("build-targets", "--scores", base, *given, "--out", tmp_path / "few-targets")
    assert "Warning: of the teacher only" in made.err
    assert "5 demonstrations are not in its folder" in made.out


def test_every_method_with_a_teacher_takes_one(
    folders: tuple[Path, Path], mistral_folder: Path
) -> None:
    compared = compare_methods(
        folders[0], [folders[1]], tokenizer=[str(SMOLLM), str(mistral_folder)]
    )
    names = {choice.method.name for choice, *_ in compared.rows if choice.needs_teacher}
    assert {"kd", "kd-hybrid", "target-sft", "jsd", "reverse-kl", "token-cleaning"} <= names
    assert all(np.isfinite(ceiling.nll) for _, ceiling, _ in compared.rows)
