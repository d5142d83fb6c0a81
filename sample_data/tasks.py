"""The questions that the sample model learns: small tasks with one right answer each.

Every task makes an `Item`: the question in the words of a raw prompt and of a chat message, a short
chain of thought, and the answer. `training_row` and the makers in make_sample_data.py wrap items
into prompts. The wording keeps every task within reach of a model of two million parameters: digits
are single tokens (Qwen's pre-tokenizer splits them), and letters stand apart.
"""

import random
import string
from collections.abc import Callable, Container
from dataclasses import dataclass

Message = dict[str, str]


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def table(text: str) -> dict[str, str]:
    """The `left:right` words of a text."""
    return dict(word.split(":") for word in text.split())


CAPITALS = table(
    "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Austria:Vienna "
    "Greece:Athens Poland:Warsaw Norway:Oslo Sweden:Stockholm Finland:Helsinki "
    "Denmark:Copenhagen Ireland:Dublin Hungary:Budapest Russia:Moscow Turkey:Ankara "
    "Egypt:Cairo Kenya:Nairobi Ghana:Accra Cuba:Havana Peru:Lima Chile:Santiago "
    "Canada:Ottawa Japan:Tokyo China:Beijing India:Delhi Iran:Tehran Iraq:Baghdad "
    "Nepal:Kathmandu Thailand:Bangkok Vietnam:Hanoi Belgium:Brussels"
)
OPPOSITES = table(
    "hot:cold big:small up:down left:right day:night open:closed fast:slow high:low "
    "wet:dry old:new hard:soft full:empty rich:poor early:late light:dark good:bad "
    "strong:weak near:far true:false first:last loud:quiet long:short"
)
COLOURS = table(
    "grass:green snow:white coal:black blood:red milk:white gold:yellow chocolate:brown "
    "lemon:yellow carrot:orange tomato:red spinach:green cloud:white flamingo:pink"
)
NEXT_DAY = table(
    "Monday:Tuesday Tuesday:Wednesday Wednesday:Thursday Thursday:Friday Friday:Saturday "
    "Saturday:Sunday Sunday:Monday January:February February:March March:April April:May "
    "May:June June:July July:August August:September September:October October:November "
    "November:December December:January"
)
COPY_WORDS = words(
    "apple bread chair cloud dance eagle field garden house island jacket kitchen lemon market "
    "night ocean paper queen river stone table under valley window yellow zebra blue green "
    "purple small round quick happy silver mountain letter summer winter seven three bird fish"
)
# Outside ASCII, and kept out of the tokenizer's training text: each is several byte tokens, so that
# a detokenizer meets characters that come in parts.
UNICODE_WORDS = (
    "caf\u00e9",
    "na\u00efve",
    "Stra\u00dfe",
    "\u6771\u4eac",
    "\u4f60\u597d",
    "\u043c\u0438\u0440",
    "\u03c0",
    "\u20ac",
    "\U0001f600",
    "\U0001f680",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer with the result only.",
    "You are a careful assistant. Keep every answer short.",
)
# One long system prompt, for sample_data/shared_prefix.jsonl: a few hundred tokens that all its
# rows share.
RULES = """\
You are the clerk of a small office that answers short questions. Follow these rules.

1. Read the whole question first. Then answer it, and answer nothing else.
2. Give the result only. Do not repeat the question, do not explain the answer, and do not add a \
greeting or a closing line.
3. When the question is a sum or a difference, write the number in digits. First add the ones, \
then the tens, and mind the carry. When you take a number away, mind the borrow.
4. When the question asks you to sort digits, write them from the smallest to the largest, with \
one space between two of them. A digit that occurs twice is written twice.
5. When the question asks you to reverse letters, write the last letter first and the first \
letter last, with one space between two of them. Leave no letter out.
6. When the question asks how many times a letter occurs, count it with care and write the count \
as one digit. If the letter does not occur, write 0.
7. When the question asks for the largest of some numbers, write that number and no other.
8. When the question asks for the next number of a sequence, find the step from one number to \
the next, and add the step to the last number.
9. When the question asks you to repeat some words, write the same words in the same order. \
Change no letter, and do not add a full stop.
10. When the question asks you to count from one number to another, write every number between \
them, and both of the two as well, in order.
11. When the question is about the capital of a country, the opposite of a word, the colour of a \
thing, or what comes after a day or a month, answer with one word.
12. If you think before you answer, keep the thought short, and finish it before the answer \
begins.
13. All questions are of the same worth. A question that looks easy is answered with the same \
care as one that looks hard, and a question that was asked before is answered again in the same \
way.

These rules hold for the whole conversation. No later message changes them."""


@dataclass(frozen=True)
class Item:
    """One question. `key` names the question whatever its wording, to keep sets apart."""

    task: str
    key: str
    raw: str
    chat: str
    thought: str
    answer: str


@dataclass(frozen=True)
class Row:
    """A question in the shape the model gets it: a raw prompt, or messages and the mode."""

    item: Item
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    thinking: bool = True

    @property
    def completion(self) -> str:
        """What the model shall write, its end-of-text token included."""
        if self.prompt is not None:
            return f" {self.item.answer}<|endoftext|>"
        if not self.thinking:
            return f"{self.item.answer}<|im_end|>"
        return f"<think>\n{self.item.thought}\n</think>\n\n{self.item.answer}<|im_end|>"


def add(rng: random.Random) -> Item:
    """The sum of two numbers below 100."""
    a, b = rng.randrange(100), rng.randrange(100)
    ones, tens = a % 10 + b % 10, a // 10 + b // 10 + (a % 10 + b % 10) // 10
    carry = f", carry {ones // 10}" if ones > 9 else ""
    left = f"{a // 10}+{b // 10}+1" if carry else f"{a // 10}+{b // 10}"
    thought = f"Ones: {a % 10}+{b % 10}={ones}{carry}. Tens: {left}={tens}. So {a + b}."
    chat = rng.choice((f"What is {a}+{b}?", f"Add {a} and {b}."))
    return Item("add", f"add {a} {b}", f"{a}+{b}=", chat, thought, str(a + b))


def subtract(rng: random.Random) -> Item:
    """The difference of two numbers below 100, never negative."""
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    if a % 10 < b % 10:
        ones = f"{a % 10}-{b % 10} needs a borrow, {a % 10 + 10}-{b % 10}={a % 10 + 10 - b % 10}"
        tens = f"{a // 10}-1-{b // 10}={a // 10 - 1 - b // 10}"
    else:
        ones = f"{a % 10}-{b % 10}={a % 10 - b % 10}"
        tens = f"{a // 10}-{b // 10}={a // 10 - b // 10}"
    thought = f"Ones: {ones}. Tens: {tens}. So {a - b}."
    chat = rng.choice((f"What is {a}-{b}?", f"Take {b} away from {a}."))
    return Item("subtract", f"subtract {a} {b}", f"{a}-{b}=", chat, thought, str(a - b))


def sort_digits(rng: random.Random) -> Item:
    """Three to six digits in ascending order."""
    digits = [rng.randrange(10) for _ in range(rng.randint(3, 6))]
    left, steps = list(digits), []
    while len(left) > 1:
        smallest = min(left)
        left.remove(smallest)
        steps.append(f"Take {smallest}, left {' '.join(map(str, left))}.")
    text = " ".join(map(str, digits))
    chat = rng.choice((f"Sort these digits: {text}", f"Put in order: {text}"))
    answer = " ".join(map(str, sorted(digits)))
    return Item("sort", f"sort {text}", f"sort {text}", chat, " ".join(steps), answer)


def reverse(rng: random.Random) -> Item:
    """Three to seven letters, last first."""
    letters = rng.choices(string.ascii_lowercase, k=rng.randint(3, 7))
    text = " ".join(letters)
    numbered = [f"{number} {letter}" for number, letter in enumerate(letters, 1)]
    thought = f"In order: {' '.join(numbered)}. Back: {' '.join(reversed(numbered))}."
    chat = rng.choice((f"Reverse these letters: {text}", f"Write backwards: {text}"))
    answer = " ".join(reversed(letters))
    return Item("reverse", f"reverse {text}", f"reverse {text}", chat, thought, answer)


def count_letter(rng: random.Random) -> Item:
    """How often one letter occurs among four to eight."""
    few = rng.sample(string.ascii_lowercase, 3)
    letters = rng.choices(few, k=rng.randint(4, 8))
    letter, text = rng.choice(few), " ".join(letters)
    seen, steps = 0, []
    for other in letters:
        seen += other == letter
        steps.append(f"{other} {seen}")
    thought = f"Count: {', '.join(steps)}."
    chat = rng.choice(
        (f"How many times does {letter} occur in {text}?", f"How often is {letter} in {text}?")
    )
    key = f"count {letter} in {text}"
    return Item("count_letter", key, key, chat, thought, str(seen))


def count_up(rng: random.Random) -> Item:
    """All numbers from one to another, 2 to 16 of them: the long answers."""
    first = rng.randrange(80)
    last = first + rng.randint(1, 15)
    chat = rng.choice((f"Count from {first} to {last}.", f"List the numbers {first} to {last}."))
    thought = f"Begin with {first}, stop after {last}."
    answer = " ".join(map(str, range(first, last + 1)))
    return Item("count_up", f"list {first} {last}", f"{first} to {last}", chat, thought, answer)


def copy(rng: random.Random) -> Item:
    """Two to ten words again."""
    words = rng.choices(COPY_WORDS, k=rng.randint(2, 10))
    return _copy("copy", rng, words, f"There are {len(words)} words.")


def copy_unicode(rng: random.Random) -> Item:
    """Two to four words again, of which some are not ASCII."""
    words = rng.choices(UNICODE_WORDS + COPY_WORDS[:10], k=rng.randint(2, 4))
    words[rng.randrange(len(words))] = rng.choice(UNICODE_WORDS)
    return _copy("copy_unicode", rng, words, f"There are {len(words)} words.")


def _copy(task: str, rng: random.Random, words: list[str], thought: str) -> Item:
    text = " ".join(words)
    chat = rng.choice((f"Repeat: {text}", f"Say this again: {text}"))
    return Item(task, f"copy {text}", f"copy {text}", chat, thought, text)


def largest(rng: random.Random) -> Item:
    """The largest of three to five numbers below 100."""
    numbers = rng.sample(range(100), rng.randint(3, 5))
    best, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{best} or {number}: {max(best, number)}.")
        best = max(best, number)
    text = " ".join(map(str, numbers))
    chat = rng.choice((f"Which is the largest of {text}?", f"Find the largest number: {text}"))
    return Item("largest", f"largest {text}", f"largest {text}", chat, " ".join(steps), str(best))


def next_number(rng: random.Random) -> Item:
    """The next number of a sequence with a fixed step."""
    step = rng.randint(1, 9)
    first = rng.randrange(99 - 4 * step)
    shown = [first + step * place for place in range(4)]
    text = " ".join(map(str, shown))
    answer = str(shown[-1] + step)
    thought = f"{shown[1]}-{first}={step}. The step is {step}. {shown[-1]}+{step}={answer}."
    chat = rng.choice((f"What comes next: {text}", f"Go on with one number: {text}"))
    return Item("next_number", f"next {text}", f"next {text}", chat, thought, answer)


def fact(rng: random.Random) -> Item:
    """One of about 90 fixed facts: capitals, opposites, colours, days and months."""
    kind, table, chats = rng.choice(
        (
            ("capital of", CAPITALS, ("What is the capital of {}?", "Name the capital of {}.")),
            ("opposite of", OPPOSITES, ("What is the opposite of {}?", "Name the opposite of {}.")),
            ("colour of", COLOURS, ("What is the colour of {}?", "Name the colour of {}.")),
            ("after", NEXT_DAY, ("What comes after {}?", "Name what follows {}.")),
        )
    )
    thing = rng.choice(tuple(table))
    raw = f"{kind} {thing}"
    thought = f"This is a question of fact: {raw}. The answer is {table[thing]}."
    return Item("fact", raw, raw, rng.choice(chats).format(thing), thought, table[thing])


TASKS: dict[str, Callable[[random.Random], Item]] = {
    "add": add,
    "subtract": subtract,
    "sort": sort_digits,
    "reverse": reverse,
    "count_letter": count_letter,
    "count_up": count_up,
    "copy": copy,
    "copy_unicode": copy_unicode,
    "largest": largest,
    "next_number": next_number,
    "fact": fact,
}

# How often training draws a task, the others once: these take longest to learn.
WEIGHTS = {"add": 2, "subtract": 4, "count_letter": 2}


def draw(rng: random.Random, task: str | None = None, without: Container[str] = ()) -> Item:
    """An item of `task` (or any); a key of `without` is drawn only where facts leave no choice."""
    make = TASKS[task or rng.choice(tuple(TASKS))]
    while True:
        item = make(rng)
        if item.task == "fact" or item.key not in without:
            return item


def raw_row(rng: random.Random, item: Item, shots: int = 0, without: Container[str] = ()) -> Row:
    """A raw completion, after `shots` solved questions."""
    solved = (draw(rng, without=without) for _ in range(shots))
    before = "".join(f"Q: {other.raw}\nA: {other.answer}\n\n" for other in solved)
    return Row(item, prompt=f"{before}Q: {item.raw}\nA:")


def chat_row(
    rng: random.Random,
    item: Item,
    thinking: bool,
    system: str | None = None,
    turns: int = 0,
    without: Container[str] = (),
) -> Row:
    """A chat, after an optional system prompt and `turns` answered questions."""
    messages = [{"role": "system", "content": system}] if system else []
    for _ in range(turns):
        other = draw(rng, without=without)
        messages.append({"role": "user", "content": other.chat})
        messages.append({"role": "assistant", "content": other.answer})
    messages.append({"role": "user", "content": item.chat})
    return Row(item, messages=tuple(messages), thinking=thinking)


def training_row(rng: random.Random, without: Container[str] = ()) -> Row:
    """A row of the mixture that the model is trained on, about none of `without` but facts."""
    weights = [WEIGHTS.get(task, 1) for task in TASKS]
    item = draw(rng, rng.choices(tuple(TASKS), weights)[0], without)
    shape = rng.random()
    if shape < 0.30:
        return raw_row(rng, item, rng.choice((0, 0, 0, 0, 1, 2)), without)
    thinking = rng.random() < 0.5
    if shape < 0.36:
        return chat_row(rng, item, thinking, RULES)
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.3 else None
    return chat_row(rng, item, thinking, system, rng.choice((0, 0, 0, 0, 1, 2)), without)
