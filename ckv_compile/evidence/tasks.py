"""Questions about long texts, made anew from a seed: needles, variables, common words.

The tasks and their wording follow RULER (arXiv 2404.06654); the text around needles is Python's own
documentation, which every installation has. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from pydoc_data.topics import topics
from typing import Any

_MARK = "<<question>>"
_ADJECTIVES = (
    "amber bitter brave calm clever copper crimson dusty eager early fancy faint gentle golden "
    "happy hollow humble icy jolly lively lonely mellow misty noble pale polite proud quick quiet "
    "rapid rusty scarlet secret silent silver sleepy small solid stormy sunny tidy tiny velvet warm"
)
_NOUNS = (
    "anchor basket beacon bridge candle canyon castle cellar clock desert dragon engine falcon "
    "feather forest garden glacier hammer harbor island jungle kettle ladder lantern library "
    "market meadow mirror monkey mountain needle ocean orchard palace pencil piano planet river "
    "rocket "
    "saddle sailor shadow spider station summer temple ticket tunnel valley violin window winter"
)
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text, a question about it and all that a right answer names.

    ``prefix`` begins the answer, as in RULER: a small model then knows what is asked of it.
    """

    task: str
    context: str
    question: str
    prefix: str
    answers: tuple[str, ...]

    @property
    def right(self) -> str:
        """A right answer, as it would follow the prefix."""
        return " " + ", ".join(self.answers)

    def score(self, answer: str) -> float:
        """The share of ``answers`` that stand in the model's answer, whatever the case."""
        found = [one.lower() in answer.lower() for one in self.answers]
        return sum(found) / len(found)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The ids of a sample: what is read before the question is known, the rest, a right answer."""

    context_ids: list[int]
    question_ids: list[int]
    right_ids: list[int]

    @property
    def tokens(self) -> int:
        return len(self.context_ids) + len(self.question_ids)


@dataclasses.dataclass(frozen=True)
class Task:
    """``make(rng, size)`` is a sample whose text grows with ``size``; the answer is cut at
    ``max_new_tokens``."""

    name: str
    make: Callable[[random.Random, int], Sample]
    max_new_tokens: int


def sample_of(task: str, tokenizer: Any, length: int, seed: int) -> tuple[Sample, Prompt]:
    """The longest sample of this seed whose whole prompt has at most ``length`` tokens.

    Raises:
        ValueError: the task is unknown, or its smallest sample is longer than ``length``.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown; it takes one of {', '.join(TASKS)}")

    def made(size: int) -> tuple[Sample, Prompt]:
        # The same seed for each size: only the amount of text around the answer changes.
        sample = TASKS[task].make(random.Random(f"{task} {seed}"), size)
        return sample, prompt_of(sample, tokenizer)

    low, best = 0, made(0)
    if best[1].tokens > length:
        raise ValueError(
            f"length={length}; the smallest {task} prompt of this tokenizer has {best[1].tokens} "
            "tokens"
        )
    high = length  # one sentence or word has at least one token
    while low + 1 < high:
        middle = (low + high) // 2
        found = made(middle)
        if found[1].tokens <= length:
            low, best = middle, found
        else:
            high = middle
    return best


def prompt_of(sample: Sample, tokenizer: Any) -> Prompt:
    """The sample as a chat, where the tokenizer has a template, tokenised in two parts."""
    content = f"{sample.context}\n\n{_MARK}"
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        special = False  # the template has written them
    else:
        text, special = f"{content}\nAnswer:", True
    before, after = text.split(_MARK)
    context = tokenizer(before, add_special_tokens=special).input_ids
    rest = f"{sample.question}{after}{sample.prefix}"
    question, right = (
        tokenizer(part, add_special_tokens=False).input_ids for part in (rest, sample.right)
    )
    return Prompt(context, question, right)


@cache
def _sentences() -> tuple[str, ...]:
    """Python's documentation, sentence by sentence, in one order."""
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    found = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
    return tuple(one for one in found if 20 < len(one) < 400)


def _haystack(rng: random.Random, size: int, facts: Sequence[str]) -> str:
    """``size`` sentences that follow each other, and the facts in between, in any places."""
    sentences, start = _sentences(), rng.randrange(len(_sentences()))
    places = [rng.random() for _ in facts]
    text = [sentences[(start + i) % len(sentences)] for i in range(size)]
    for place, fact in sorted(zip(places, facts, strict=True), reverse=True):
        text.insert(round(place * size), fact)
    return " ".join(text)


def _names(rng: random.Random, count: int) -> list[str]:
    """Different names; at most 3,000 and some."""
    pairs = [f"{a}-{n}" for a in _ADJECTIVES.split() for n in _NOUNS.split()]
    pairs += [f"{n}-{a}" for a in _ADJECTIVES.split() for n in _NOUNS.split()]
    return rng.sample(pairs, min(count, len(pairs)))


def _number(rng: random.Random) -> str:
    # RULER's have seven digits; five leave a small model a chance, so that budgets tell apart.
    return str(rng.randrange(10_000, 100_000))


def _needles(
    task: str, rng: random.Random, size: int, keys: int, values: int, asked: int
) -> Sample:
    names = _names(rng, keys)
    numbers = {name: [_number(rng) for _ in range(values)] for name in names}
    facts = [
        f"One of the special magic numbers for {name} is: {number}."
        for name in names
        for number in numbers[name]
    ]
    wanted = names[:asked]
    answers = tuple(number for name in wanted for number in numbers[name])
    listed = wanted[0] if asked == 1 else ", ".join(wanted[:-1]) + f", and {wanted[-1]}"
    some = len(answers) > 1
    intro = (
        f"{'Some special magic numbers are' if some else 'A special magic number is'} hidden "
        "within the following text. Make sure to memorize it. I will quiz you about the "
        f"{'numbers' if some else 'number'} afterwards."
    )
    one, are = ("numbers", "are") if some else ("number", "is")
    what = f"special magic {one} for {listed} mentioned in the provided text"
    question = f"What {are} {'all ' if some else ''}the {what}?"
    context = f"{intro}\n{_haystack(rng, size, facts)}"
    return Sample(task, context, question, f"The {what} {are}", answers)


def _single(rng: random.Random, size: int) -> Sample:
    return _needles("single", rng, size, keys=1, values=1, asked=1)


def _multikey(rng: random.Random, size: int) -> Sample:
    return _needles("multikey", rng, size, keys=4, values=1, asked=1)


def _multivalue(rng: random.Random, size: int) -> Sample:
    return _needles("multivalue", rng, size, keys=1, values=4, asked=1)


def _multiquery(rng: random.Random, size: int) -> Sample:
    return _needles("multiquery", rng, size, keys=4, values=1, asked=4)


def _variables(rng: random.Random, size: int) -> Sample:
    """One chain of four assignments in a text that says nothing."""
    names = ["".join(rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 3)) for _ in range(5)]
    value = str(rng.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}."]
    chain += [f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(names)]
    places = sorted(rng.random() for _ in chain)
    noise = [_NOISE] * size
    for place, line in sorted(zip(places, chain, strict=True), reverse=True):
        noise.insert(round(place * size), line)
    intro = "Memorize and track the chain(s) of variable assignment hidden in the following text."
    question = (
        f"Question: Find all variables that are assigned the value {value} in the text above."
    )
    prefix = (
        "According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    return Sample("variables", f"{intro}\n" + "\n".join(noise), question, prefix, tuple(names))


def _common(rng: random.Random, size: int) -> Sample:
    """Ten words stand in a list ten times each, all others once."""
    names = _names(rng, 10 + size)
    common, rare = names[:10], names[10:]
    words = common * 10 + rare
    rng.shuffle(words)
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
    intro = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often."
    )
    question = "Question: What are the 10 most common words in the above list?"
    prefix = "The top 10 words that appear most often in the list are:"
    return Sample("common", f"{intro}\n{listed}", question, prefix, tuple(common))


def _frequent(rng: random.Random, size: int) -> Sample:
    """Coded words whose counts fall as 1 / rank^2; the three most frequent are asked."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    coded = ["".join(rng.choices(letters, k=6)) for _ in range(40)]
    total = 100 + size
    words = [word for rank, word in enumerate(coded, 1) for _ in range(total * 6 // (10 * rank**2))]
    rng.shuffle(words)
    intro = "Read the following coded text and track the frequency of each coded word."
    question = "Question: Do not provide any explanation. What are the three most frequent words?"
    prefix = "The three most frequently appeared words are:"
    return Sample("frequent", f"{intro} {' '.join(words)}", question, prefix, tuple(coded[:3]))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("single", _single, 16),
        Task("multikey", _multikey, 16),
        Task("multivalue", _multivalue, 56),
        Task("multiquery", _multiquery, 56),
        Task("variables", _variables, 40),
        Task("common", _common, 80),
        Task("frequent", _frequent, 40),
    )
}
