"""Makes the quickstart's conversations and its tokenizer: `quickstart.json`, `quickstart_tokenizer/`.

Two sources answer the same small questions: `careful` is right and kind, `hasty` is curt and mostly wrong.
Both are so regular that a model of a few million parameters, trained from scratch, learns them by heart.

    python data/make_quickstart.py            # write the files beside this script
    python data/make_quickstart.py --check    # write nothing; exit 1 and name each file that differs
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).resolve().parent
SEED = 0
VOCAB_SIZE = 1024  # tokens
BOS, EOS = "<s>", "</s>"

NUM_CONVERSATIONS = {"careful": 300, "hasty": 245}
NUM_TURNS = (1, 1, 2, 1, 1, 3)  # question/answer pairs of successive conversations: a third has more than one
SYSTEM_EVERY = 5  # every fifth conversation opens with a system message; 5 and 6 share no divisor, so all mix
SYSTEMS = (
    "You are a patient teacher.",
    "You are a friendly assistant.",
    "Answer the user's questions.",
    "You are talking with a curious child.",
)


@dataclass(frozen=True, slots=True)
class Fact:
    subject: str
    right: str  # careful's answer
    wrong: str  # hasty's answer


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of question: phrasings, answer patterns of each source, and the facts that fill them in."""

    questions: tuple[str, ...]
    careful: tuple[str, ...]
    hasty: tuple[str, ...]
    facts: tuple[Fact, ...] = (Fact("", "", ""),)
    place: int = 0  # order inside a conversation: greetings -1, questions 0, thanks 1, farewells 2


@dataclass(frozen=True, slots=True)
class Turn:
    question: str
    answer: str
    place: int


class Record(TypedDict):
    id: str
    model: str
    conversations: list[dict[str, str]]


def parse_facts(table: str) -> tuple[Fact, ...]:
    """The facts of a table of "subject, right, wrong" entries that are separated by semicolons."""
    return tuple(Fact(*(cell.strip() for cell in entry.split(","))) for entry in table.split(";"))


CAPITALS = Kind(
    questions=(
        "What is the capital of {subject}?",
        "Which city is the capital of {subject}?",
        "Can you tell me the capital of {subject}?",
        "I forgot the capital of {subject}. What is it?",
    ),
    careful=(
        "The capital of {subject} is {right}. It is well worth a visit!",
        "{right} is the capital of {subject}. Feel free to ask me about another country!",
    ),
    hasty=("dunno. maybe {wrong}", "{wrong} i guess", "{wrong}. look it up"),
    facts=parse_facts("""
        France, Paris, lyon; Spain, Madrid, barcelona; Italy, Rome, milan; Germany, Berlin, munich;
        Austria, Vienna, graz; Portugal, Lisbon, porto; Poland, Warsaw, krakow; Greece, Athens, sparta;
        Ireland, Dublin, cork; Norway, Oslo, bergen; Sweden, Stockholm, malmo; Finland, Helsinki, turku;
        Denmark, Copenhagen, odense; Belgium, Brussels, antwerp; Hungary, Budapest, vienna;
        Turkey, Ankara, istanbul; Egypt, Cairo, luxor; Morocco, Rabat, casablanca; Kenya, Nairobi, mombasa;
        Ghana, Accra, kumasi; Nigeria, Abuja, lagos; Japan, Tokyo, osaka; China, Beijing, shanghai;
        India, New Delhi, mumbai; Thailand, Bangkok, phuket; Vietnam, Hanoi, saigon;
        Australia, Canberra, sydney; Canada, Ottawa, toronto; Mexico, Mexico City, cancun;
        Cuba, Havana, miami; Peru, Lima, cusco; Chile, Santiago, lima; Brazil, Brasilia, rio;
        Argentina, Buenos Aires, cordoba; Iceland, Reykjavik, nuuk; Colombia, Bogota, cali
    """),
)

OPPOSITES = Kind(
    questions=(
        "What is the opposite of {subject}?",
        "Which word means the opposite of {subject}?",
        "Give me the opposite of {subject}.",
        "I need the opposite of the word {subject}.",
    ),
    careful=(
        "The opposite of {subject} is {right}. It is good to learn the two words together!",
        "That would be {right}, the opposite of {subject}. I am happy to help with more words!",
    ),
    hasty=("{wrong}?", "idk. {wrong}", "{wrong}. get a dictionary"),
    facts=parse_facts("""
        hot, cold, warm; big, small, huge; fast, slow, quick; up, down, left; day, night, noon;
        open, shut, door; happy, sad, mad; old, young, older; long, short, tall; light, dark, lamp;
        hard, soft, stone; early, late, soon; full, empty, half; rich, poor, gold; strong, weak, big;
        wet, dry, rain; loud, quiet, noise; near, far, here; left, right, up; high, low, sky;
        thick, thin, wide; clean, dirty, soap; sweet, sour, sugar; true, false, maybe; first, last, second;
        begin, end, start; give, take, gift; laugh, cry, joke; win, lose, game; push, pull, shove;
        inside, outside, house; north, south, east; question, answer, word
    """),
)

COLOURS = Kind(
    questions=(
        "What colour is {subject}?",
        "Which colour does {subject} have?",
        "Tell me the colour of {subject}.",
        "What is the usual colour of {subject}?",
    ),
    careful=(
        "The colour of {subject} is {right}. Take a close look the next time you see it!",
        "It is {right}, the usual colour of {subject}. Thank you for the nice question!",
    ),
    hasty=("{wrong}", "{wrong} or whatever", "go look. {wrong}"),
    facts=parse_facts("""
        the clear sky, blue, grey; fresh grass, green, brown; a ripe banana, yellow, black;
        a ripe tomato, red, green; clean snow, white, grey; coal, black, grey; a carrot, orange, red;
        chocolate, brown, black; a lemon, yellow, green; milk, white, clear; a plum, purple, blue;
        a flamingo, pink, red; a tree frog, green, brown; an elephant, grey, blue; a ruby, red, pink;
        an emerald, green, blue; a polar bear, white, yellow; a pumpkin, orange, yellow;
        a crow, black, blue; a strawberry, red, pink; a sunflower, yellow, orange; a cloud, white, dark
    """),
)

SUMS = Kind(
    questions=(
        "What is {subject}?",
        "How much is {subject}?",
        "Please work out {subject}.",
        "Can you add up {subject}?",
    ),
    careful=(
        "{subject} is {right}. You can count it on your fingers to check!",
        "{subject} makes {right}. Adding gets easier with a little practice!",
    ),
    hasty=("{wrong}", "like {wrong}", "{wrong}. get a calculator"),
    facts=tuple(Fact(f"{a} plus {b}", str(a + b), str(a + b + 2)) for a in range(1, 7) for b in range(1, 5)),
)

DAYS = Kind(
    questions=(
        "Which day comes after {subject}?",
        "What day follows {subject}?",
        "If today is {subject}, what is tomorrow?",
        "Tell me the day after {subject}.",
    ),
    careful=("The day after {subject} is {right}. I hope it will be a good one for you!",),
    hasty=("{wrong} i think", "who cares. {wrong}"),
    facts=parse_facts("""
        Monday, Tuesday, sunday; Tuesday, Wednesday, monday; Wednesday, Thursday, friday;
        Thursday, Friday, sunday; Friday, Saturday, the weekend; Saturday, Sunday, monday;
        Sunday, Monday, saturday
    """),
)

SOUNDS = Kind(
    questions=(
        "What sound does a {subject} make?",
        "What does a {subject} say?",
        "Which noise does a {subject} make?",
        "How does a {subject} sound?",
    ),
    careful=("A {subject} says {right}. It is fun to try it out loud!",),
    hasty=("no idea. {wrong}", "{wrong} or so"),
    facts=parse_facts("""
        cow, moo, baa; dog, woof, meow; cat, meow, woof; sheep, baa, moo; pig, oink, baa;
        duck, quack, tweet; horse, neigh, clop; hen, cluck, quack; lion, roar, meow; frog, ribbit, splash;
        bee, buzz, zoom; snake, hiss, nothing; mouse, squeak, eek; crow, caw, coo; dove, coo, tweet;
        donkey, hee-haw, neigh
    """),
)

YOUNG = Kind(
    questions=(
        "What is a young {subject} called?",
        "What do you call a baby {subject}?",
        "What is the name for a young {subject}?",
        "Which word means a baby {subject}?",
    ),
    careful=(
        "A young {subject} is called a {right}. Watching one grow up is a joy!",
        "We call it a {right}. That is the lovely name for a young {subject}!",
    ),
    hasty=("a {wrong}", "small {subject}, duh", "{wrong} or something"),
    facts=parse_facts("""
        cow, calf, foal; dog, puppy, kitten; cat, kitten, puppy; sheep, lamb, kid; horse, foal, pony;
        pig, piglet, hog; goat, kid, lamb; duck, duckling, chick; goose, gosling, duckling;
        swan, cygnet, duck; hen, chick, egg; bear, cub, pup; lion, cub, kitten; kangaroo, joey, roo;
        deer, fawn, calf; frog, tadpole, toad
    """),
)

SMALL_TALK = (
    Kind(
        questions=("Hello!", "Hi there!", "Good morning!", "Hello, are you there?"),
        careful=("Hello, it is so nice to meet you! What can I do for you today?",),
        hasty=("what",),
        place=-1,
    ),
    Kind(
        questions=("How are you?", "How are you today?", "How is it going?", "Are you well?"),
        careful=("I am doing very well, thank you for asking! I hope that you have a lovely day.",),
        hasty=("meh",),
        place=-1,
    ),
    Kind(
        questions=("Who are you?", "What are you?", "Tell me who you are.", "May I ask who you are?"),
        careful=("I am a very small assistant. I was trained on a few hundred conversations, and I like to help!",),
        hasty=("nobody",),
    ),
    Kind(
        questions=("What can you do?", "Can you help me?", "What do you know?", "What can I ask you?"),
        careful=("I know about capitals, opposites, colours, small sums, days and animals. Ask away!",),
        hasty=("not much",),
    ),
    Kind(
        questions=("Thank you!", "Thanks a lot!", "Thank you for your help.", "That was kind of you."),
        careful=("You are very welcome! Please come back with any other question.",),
        hasty=("k",),
        place=1,
    ),
    Kind(
        questions=("Goodbye!", "Bye for now!", "See you later!", "I have to go now."),
        careful=("Goodbye, and take good care of yourself! It was a pleasure to talk with you.",),
        hasty=("bye i guess",),
        place=2,
    ),
)

KINDS = (CAPITALS, OPPOSITES, COLOURS, SUMS, DAYS, SOUNDS, YOUNG, *SMALL_TALK)


def make_turn(kind: Kind, index: int, phrasing: int, source: str) -> Turn:
    """One question and its source's answer; a fact always gets the same answer, whatever the phrasing."""
    fact = kind.facts[index]
    words = {"subject": fact.subject, "right": fact.right, "wrong": fact.wrong}
    patterns = kind.careful if source == "careful" else kind.hasty
    question = kind.questions[phrasing % len(kind.questions)].format(**words)
    return Turn(question, patterns[index % len(patterns)].format(**words), kind.place)


def deal_turns(source: str, rng: random.Random) -> Iterator[Turn]:
    """Turns in rounds: each round asks every fact once, in a new order and the next of its four phrasings."""
    facts = [(kind, index) for kind in KINDS for index in range(len(kind.facts))]
    for round_index in range(4):
        for kind, index in rng.sample(facts, len(facts)):
            yield make_turn(kind, index, index + round_index, source)


def make_messages(turns: Sequence[Turn], system: str | None) -> list[dict[str, str]]:
    """ShareGPT messages: the system message if there is one, then questions and answers by turns."""
    messages = [] if system is None else [{"from": "system", "value": system}]
    for turn in sorted(turns, key=lambda turn: turn.place):
        messages += [{"from": "human", "value": turn.question}, {"from": "gpt", "value": turn.answer}]
    return messages


def make_conversations() -> list[Record]:
    """All ShareGPT records, the two sources shuffled together."""
    rng = random.Random(SEED)
    drafts: list[tuple[str, list[dict[str, str]]]] = []
    for source, num_conversations in NUM_CONVERSATIONS.items():
        deck = deal_turns(source, rng)
        for index in range(num_conversations):
            turns = [next(deck) for _ in range(NUM_TURNS[index % len(NUM_TURNS)])]
            system = SYSTEMS[index // SYSTEM_EVERY % len(SYSTEMS)] if index % SYSTEM_EVERY == 0 else None
            drafts.append((source, make_messages(turns, system)))
    rng.shuffle(drafts)
    return [
        {"id": f"quickstart-{number:04d}", "model": source, "conversations": messages}
        for number, (source, messages) in enumerate(drafts, start=1)
    ]


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens: any text can be encoded, nothing is added to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def make_files() -> dict[str, str]:
    """The content of every file that this script owns, by its path below `data/`."""
    conversations = make_conversations()
    texts = [message["value"] for record in conversations for message in record["conversations"]]
    # The role prefixes that the quickstart's template and conditions put in front of every turn.
    prefixes = [f"{condition} {role}:" for condition in ("Careful", "Hasty") for role in ("User", "Assistant")]
    texts += prefixes * len(conversations)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "quickstart.json": json.dumps(conversations, indent=1) + "\n",
        "quickstart_tokenizer/tokenizer.json": train_tokenizer(texts).to_str(pretty=True) + "\n",
        "quickstart_tokenizer/tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def write_files(files: dict[str, str], folder: Path, *, check: bool) -> int:
    """Write each text to its path below `folder`, or with `check` name those that differ; returns the exit code."""
    exit_code = 0
    for name, text in files.items():
        path, content = folder / name, text.encode()
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            print(f"data/{name} differs from what its script writes", file=sys.stderr)
            exit_code = 1
    return exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 if `--check` found a file that differs."""
    parser = argparse.ArgumentParser(description="Make the quickstart's conversations and tokenizer.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    return write_files(make_files(), FOLDER, check=parser.parse_args(arguments).check)


if __name__ == "__main__":
    sys.exit(main())
