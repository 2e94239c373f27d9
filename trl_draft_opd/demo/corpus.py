# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Writes the demo's own chats: questions of seven kinds with worked answers. The same seed writes the same chats."""

import itertools
import random
from collections.abc import Callable


Chat = list[dict[str, str]]

NAMES = (
    "Aino Bela Chidi Dara Emeka Farah Goran Hana Ivo Juno Kaya Lior Mira Nils Oona Pavel Rosa Sami Tove Yara".split()
)
THINGS = (
    "apples bolts candles drums envelopes feathers globes hats jars kites lamps marbles nails onions pears ropes"
).split()
PLACES = "at the harbour|in the old mill|on the hill|by the station|in the garden|near the bridge|at the market".split(
    "|"
)
WORDS = (
    "amber birch cedar delta ember fjord grove heron iris jade koala lemon maple nectar olive pebble quartz river "
    "saffron tulip umber violet willow yarrow zephyr"
).split()
# From, to, factor.
UNITS = (
    ("metres", "centimetres", 100),
    ("kilometres", "metres", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("kilograms", "grams", 1000),
    ("dozens", "pieces", 12),
)
OPENINGS = ("Let us work it out.", "Step by step:", "Here is one way to see it.", "Gladly.", "We go slowly.")


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(11, 499), rng.randint(11, 499)
    question = rng.choice(("What is {} + {}?", "Add {} and {}.", "Please compute {} plus {}.")).format(a, b)
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    split = f"{a} = {a // 10 * 10} + {a % 10} and {b} = {b // 10 * 10} + {b % 10}"
    answer = (
        f"{rng.choice(OPENINGS)} We split {split}. The tens give {a // 10 * 10} + {b // 10 * 10} = {tens}, the ones "
        f"give {a % 10} + {b % 10} = {ones}. So {tens} + {ones} = {a + b}, and the answer is {a + b}."
    )
    return question, answer


def _buy(rng: random.Random) -> tuple[str, str]:
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    start, boxes, size = rng.randint(2, 40), rng.randint(2, 9), rng.randint(2, 9)
    verb = rng.choice(("buys", "finds", "is given"))
    question = (
        f"{name} has {start} {thing} and {verb} {boxes} boxes of {size} {thing} {place}. "
        f"How many {thing} does {name} have now?"
    )
    more = boxes * size
    answer = (
        f"{rng.choice(OPENINGS)} The boxes that {name} {verb} {place} hold {boxes} times {size}, which is {more} "
        f"{thing}. With the {start} from before, {name} has {start} + {more} = {start + more} {thing}."
    )
    return question, answer


def _convert(rng: random.Random) -> tuple[str, str]:
    source, result, factor = rng.choice(UNITS)
    amount = rng.randint(2, 60)
    form = rng.choice(("How many {1} are {2} {0}?", "Convert {2} {0} to {1}.", "Express {2} {0} in {1}."))
    answer = (
        f"There are {factor} {result} in each of the {source}. We multiply: {amount} x {factor} = {amount * factor}. "
        f"Therefore {amount} {source} are {amount * factor} {result}."
    )
    return form.format(source, result, amount), answer


def _table(rng: random.Random) -> tuple[str, str]:
    names, thing = rng.sample(NAMES, 3), rng.choice(THINGS)
    counts = rng.sample(range(1, 31), len(names))
    pairs = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    rows = "\n".join(f"| {name} | {count} |" for name, count in zip(names, counts, strict=True))
    question = f"Make a table of {thing} per person and give the total: {pairs}."
    terms = " + ".join(map(str, counts))
    best = names[counts.index(max(counts))]
    answer = f"| name | {thing} |\n|---|---|\n{rows}\n\nIn total {terms} = {sum(counts)} {thing}. {best} has the most."
    return question, answer


def _sort(rng: random.Random) -> tuple[str, str]:
    items: list = rng.sample(WORDS, rng.randint(4, 6)) if rng.random() < 0.5 else rng.sample(range(10, 100), 5)
    what = "words by the alphabet" if isinstance(items[0], str) else "numbers from small to large"
    listed = ", ".join(map(str, items))
    question = rng.choice(("Sort these {}: {}.", "Put the {} in order: {}.")).format(what.split(" ")[0], listed)
    steps, left = [], list(items)
    for _ in range(2):
        first = min(left)
        left.remove(first)
        steps.append(f"take {first}, leaving {', '.join(map(str, left))}")
    answer = (
        f"I order the {what}. First {steps[0]}. Then {steps[1]}. The result: {', '.join(map(str, sorted(items)))}."
    )
    return question, answer


def _code(rng: random.Random) -> tuple[str, str]:
    thing, number = rng.choice(THINGS), rng.randint(2, 20)
    goal, name, start, line = rng.choice(
        (
            (f"adds {number} to each of the {thing}", "add_to", "[]", f"result.append(item + {number})"),
            (f"multiplies each of the {thing} by {number}", "scale", "[]", f"result.append(item * {number})"),
            (f"keeps the {thing} above {number}", "keep", "[]", f"result += [item] if item > {number} else []"),
            (f"counts the {thing} below {number}", "count", "0", f"result += 1 if item < {number} else 0"),
        )
    )
    loop = f"    result = {start}\n    for item in {thing}:\n        {line}\n    return result"
    question = rng.choice(("Write a Python function that {}.", "I need a function in Python that {}.")).format(goal)
    return question, f"```python\ndef {name}_{thing}({thing}):\n{loop}\n```\nThe function `{name}_{thing}` {goal}."


def _letters(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS) + rng.choice(WORDS)
    letter = rng.choice(word)
    places = [index + 1 for index, other in enumerate(word) if other == letter]
    question = f'Spell "{word}" backwards and count the letter {letter}.'
    answer = (
        f"The letters are {' '.join(word)}. Backwards they read {' '.join(reversed(word))}. The letter {letter} "
        f"stands at {'place' if len(places) == 1 else 'places'} {', '.join(map(str, places))}, so it occurs "
        f"{len(places)} {'time' if len(places) == 1 else 'times'}."
    )
    return question, answer


KINDS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (_add, _buy, _convert, _table, _sort, _code, _letters)


def write_chats(count: int, seed: int) -> list[Chat]:
    """Write chats of two turns, one kind after another, without repeating a question; fewer are the first of more."""
    rng = random.Random(seed)
    chats: list[Chat] = []
    seen: set[str] = set()
    kinds = itertools.cycle(KINDS)
    while len(chats) < count:
        question, answer = next(kinds)(rng)
        # A kind that has run out of new questions is passed over.
        if question not in seen:
            seen.add(question)
            chats.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return chats
