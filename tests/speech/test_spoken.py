from __future__ import annotations

import itertools
import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salad_ray.speech.spoken import (
    cardinal,
    num_asides,
    ordinal,
    read_words,
    spoken_tokens,
    transcript_tokens,
    unreadable,
    unsaid_signs,
)
from salad_ray.tables import BadInput


def said(text: str) -> str:
    return " ".join(spoken.text for spoken in read_words(text.split()) if spoken.text)


def first_readings(text: str, in_brackets: bool = True) -> str:
    words = spoken_tokens(text.split(), in_brackets)
    return " ".join(word for tokens in words for token in tokens for word in token[0])


def readings(text: str) -> list[list[str]]:
    """Per token, its readings."""
    return [[" ".join(reading) for reading in token] for word in spoken_tokens(text.split()) for token in word]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (342, "three hundred forty two"),
        (1_000_000, "one million"),
        (2_030_500, "two million thirty thousand five hundred"),
    ],
)
def test_cardinals(number: int, words: str) -> None:
    assert " ".join(cardinal(number)) == words


def test_ordinals() -> None:
    names = [" ".join(ordinal(cardinal(number))) for number in (1, 2, 3, 5, 8, 9, 12, 20, 21, 100)]
    assert ",".join(names) == "first,second,third,fifth,eighth,ninth,twelfth,twentieth,twenty first,one hundredth"


@pytest.mark.parametrize(
    ("text", "first", "others"),
    [
        ("1905", "nineteen oh five", ["nineteen hundred five", "nineteen hundred and five", "one nine zero five"]),
        ("1984,", "nineteen eighty four", ["one thousand nine hundred eighty four"]),
        ("2005", "two thousand five", ["two thousand and five", "twenty oh five"]),
        ("1980s", "nineteen eighties", ["one thousand nine hundred eighties"]),
        ("21st", "twenty first", []),
        ("3.14", "three point one four", []),
        ("$5", "five dollars", ["five dollar"]),
        ("$1", "one dollar", ["one dollars"]),
        ("£2.50", "two pounds and fifty pence", ["two pounds fifty pence", "two fifty"]),
        ("10:30", "ten thirty", []),
        ("1/2", "a half", ["one half"]),
        ("007", "zero zero seven", ["oh oh seven"]),
        ("Mr.", "mister", []),
        ("St.", "street", ["saint"]),
        ("U.S.", "u s", []),
        ("US", "u s", ["us"]),
        ("FBI's", "f b i's", []),
        ("café,", "cafe", []),
        ("O’Neill’s", "o'neill's", []),
        ("&", "and", []),
    ],
)
def test_a_token_is_read_as_the_first_or_as_others(text: str, first: str, others: list[str]) -> None:
    # Other text, so that capitals mean something.
    (token,) = readings(f"as {text}")[1:]
    assert token[0] == first
    assert set(others) <= set(token[1:])


def test_words_split_where_a_pause_may_be() -> None:
    assert readings("well-known") == [["well"], ["known"]]
    assert readings("this—that") == [["this"], ["that"]]
    assert [token[0] for token in readings("5%")] == ["five", "percent"]
    assert " ".join(token[0] for token in readings("1,200,000")) == "one million two hundred thousand"
    assert [len(word) for word in spoken_tokens(["a", "—", "b"])] == [1, 0, 1]


def test_millions_of_dollars_are_said_after_the_million() -> None:
    amount, scale = readings("$3 million")
    assert amount == ["three"]
    assert scale == ["million dollars", "million dollar", "million"]


def test_capitals_throughout_are_no_acronyms() -> None:
    assert readings("WHO TOLD US") == [["who"], ["told"], ["us"]]
    assert readings("Who told US")[2] == ["u s", "us"]


def test_spoken_words_are_plain() -> None:
    text = "He paid $1,234.56 (≈ 3 %) on 4/5/1999 @ 7:00 to A.B.C. & co.; №5 𝔘nicode ٣ 12345678901234567890 x² ½"
    words = [word for word in spoken_tokens(text.split()) for token in word for reading in token for word in reading]
    assert words
    assert all(set(word) <= set("abcdefghijklmnopqrstuvwxyz'") for word in words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Money, with its unit behind the number.
        ("It costs $3.50 in town now.", "It costs three dollars and fifty cents in town now."),
        ("Wages are $40 a week.", "Wages are forty dollars a week."),
        ("$40-$50, $5-10 million, $5bn, £1, 40¢", "forty dollars to fifty dollars, five to ten million dollars, "
         "five billion dollars, one pound, forty cents"),
        ("$40/week and $0.05", "forty dollars per week and five cents"),
        # Fractions and powers; the marks of footnotes are not said.
        ("Add 3/4 cup, ½ cup, 2½ cups, 1 1/2 cups.", "Add three quarters cup, a half cup, two and a half cups, "
         "one and a "
         "half cups."),
        ("10⁵ mc² 5m² x^2 10⁻³", "ten to the fifth mc squared five square meters x squared ten to the minus three"),
        ("In 1812³, or 1905.² it ended.¹", "In eighteen twelve, or nineteen oh five. it ended."),
        # Roman numerals.
        ("Henry VIII and Louis XIV's son", "Henry the eighth and Louis the fourteenth's son"),
        ("Chapter IV, World War II, Part I, MDCCLXXVI", "Chapter four, World War two, Part one, seventeen seventy six"),
        ("Charles I, and I; a CD, the MIX, an XL", "Charles the first, and I; a CD, the MIX, an XL"),
        ("the letter “C” in Appendix C", "the letter “C” in Appendix C"),
        ("375°F/190°C, 3 births/1,000", "three hundred seventy five degrees fahrenheit one hundred ninety "
         "degrees celsius, "
         "three births per one thousand"),
        # Ranges, ratios and slashes.
        ("From 10-15 men in 1914–18 won 3:1, and/or 5 km/h.", "From ten to fifteen men in nineteen fourteen to "
         "eighteen "
         "won three to one, and or five kilometers per hour."),
        ("Call 555-1234, not 555-123-4567.", "Call five five five one two three four, not five five five one two three "
         "four five six seven."),
        ("Listing 19-27 and C1–C7, 3,400 mg/day", "Listing nineteen twenty seven and C one to C seven, three thousand "
         "four hundred milligrams per day"),
        # Abbreviations.
        ("the codon AUG. On Aug. 5", "the codon AUG. On August fifth"),
        ("Dr. Smith vs. St. John on Main St. in town", "Doctor Smith versus Saint John on Main Street in town"),
        ("The No. 1 man says no. No 10.", "The Number one man says no. Number ten."),
        ("He has a Ph.D. in town, e.g. the U.S. one.", "He has a P H D in town, for example the U S one."),
        ("Roe v. Wade, J. Smith Jr., pp. 3–5, Fig. 2, Jan. 5", "Roe versus Wade, J Smith Junior, pages three to five, "
         "Figure two, January fifth"),
        # Units.
        ("5 ft. tall, 70 mph, 10GB, 1 km, 5′ 2″, 5'2\" tall", "five feet tall, seventy miles per hour, ten "
         "gigabytes, one "
         "kilometer, five feet two inches, five feet two inches tall"),
        ("-5°C, 50℃, 98.6°F", "minus five degrees celsius, fifty degrees celsius, ninety eight point six degrees "
         "fahrenheit"),
        ("5 in the morning, 5 in. long", "five in the morning, five inches long"),
        # Dates and times.
        ("10:30 p.m., 5pm, at 7:00, 2026-11-30, 4/5/1999", "ten thirty P M, five P M, at seven o'clock, "
         "november thirtieth "
         "twenty twenty six, april fifth nineteen ninety nine"),
        ("the '90s, 1980s, 21st, 007, .5, 3.11.7", "the 'nineties, nineteen eighties, twenty first, zero zero "
         "seven, point "
         "five, three point eleven point seven"),
        # Signs that look like others.
        ("Ａ Ｂ, ①, 𝔘nicode, ٣", "A B, one, Unicode, three"),
        ("Under § 5 & #1 ∀x: a ≥ b, α-particles", "Under section five and number one for all x: a at least b, "
         "alpha-particles"),
        ("hy\u00adphen zero\u200bwidth &amp; It´s", "hyphen zerowidth and It's"),
        # What is no number or sign stays as it is.
        ("“Well-known,” he'd said… a café (naïve) — so!", "“Well-known,” he'd said… a café (naïve) — so!"),
    ],
)  # fmt: skip
def test_what_a_synthesizer_is_given(text: str, expected: str) -> None:
    assert said(text) == expected


@pytest.mark.parametrize("text", ["Привет", "a 你好 b", "水", "λόγος", "x \ufffd", "שלום", "ひらがな", "１と"])
def test_what_has_no_english_reading_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(BadInput, match="no English reading"):
        read_words(text.split())
    assert unreadable(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[laughter] so it is", "so it is"),
        ("so [Music playing] it is ♪", "so it is"),
        ("so (laughs) it is [12], [citation needed]", "so it is"),
        ("so <noise> it is 😀", "so it is"),
        ("the arts (music) and <i>this</i>", "the arts music and this"),
        ("[H]e said", "he said"),
    ],
)
def test_what_nobody_says_is_not_looked_for(text: str, expected: str) -> None:
    assert first_readings(text) == expected
    assert len(spoken_tokens(text.split())) == len(text.split())


def test_signs_that_are_not_said_are_counted() -> None:
    assert unsaid_signs("So 😀 it is ♪, “5 %” — and/or ⏰done™.") == "😀♪/⏰"
    assert unsaid_signs("So it is, (he said) “5 km” — $3.50 & C# [laughter]") == ""
    assert unsaid_signs("ab_c 「so」、 ¿it? • is。 • _ ( well") == "_「」、¿•。•_("
    assert unsaid_signs("so ( it is ' here") == "('", "of plain text too"


def test_asides_that_are_not_said_are_counted() -> None:
    assert num_asides("So [laughter] it is [12], <i>there</i> (laughs) and <noise>") == 6
    assert num_asides("He told [the king] (so he said) that 5 < 6 * 2") == 0


def test_no_sign_of_any_script_is_dropped_without_a_count() -> None:
    """Each is said, refused, given to the synthesizer, or counted: by itself, behind a word and within one."""
    characters = map(chr, [*range(0x3100), *range(0xFE10, 0xFFFF)])
    signs = [char for char in characters if unicodedata.category(char)[0] in "PS"]
    dropped = []
    for char, (pattern, num_words) in itertools.product(signs, {"ab {} cd": 2, "ab{} cd": 2, "ab{}cd ef": 3}.items()):
        try:
            words = read_words(pattern.format(char).split())
        except BadInput:
            continue
        is_said = sum(len(word.tokens) for word in words) > num_words
        is_given = {char, *unicodedata.normalize("NFKC", char), *"'—-…"} & set("".join(word.text for word in words))
        if not (is_said or is_given or any(word.unsaid for word in words)):
            dropped.append((char, pattern))
    assert len(signs) > 3000
    assert not dropped


def test_words_in_brackets_are_read_and_an_aligner_also_tries_without() -> None:
    text = "He told [the king] that, [laughter] and [h]e left. [12]"
    assert said(text) == "He told [the king] that, and he left."
    assert first_readings(text, in_brackets=False) == "he told that and he left"
    inserted = "and then [I] left him [b] there"
    assert first_readings(inserted) == "and then i left him there"
    assert first_readings(inserted, in_brackets=False) == "and then left him there"
    assert len(transcript_tokens(text.split())) == 2
    assert len(transcript_tokens(["He", "left", "[laughter]", "and", "[w]ent", "[12]."])) == 1


@given(
    st.text(
        st.sampled_from("ab Z.,!?—-–\"'’()[]{}<>&;:$£5018/%°²³½§#@^~IVX\u00adé😀Ж\u200b") | st.characters(), max_size=40
    )
)
def test_every_text_is_read_or_refused_word_by_word(text: str) -> None:
    try:
        words = read_words(text.split())
    except BadInput:
        return
    assert len(words) == len(text.split())
    for spoken in words:
        heard = [word for token in spoken.tokens for reading in token for word in reading]
        assert all(word and set(word) <= set("abcdefghijklmnopqrstuvwxyz'") for word in heard)
        assert not any(char.isdigit() for char in spoken.text)
        assert bool(spoken.tokens) == any(char.isalpha() for char in spoken.text)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("It cost $5m or £20m.", "It cost five million dollars or twenty million pounds."),
        ("From $1-2m to €3.5m", "From one to two million dollars to three point five million euros"),
        ("5m or 20 m long", "five meters or twenty meters long"),
        ("A B2B deal", "A B two B deal"),
        ("an IV and XX chromosomes", "an IV and XX chromosomes"),
        ("World War II, Part IV, the XIX century", "World War two, Part four, the nineteenth century"),
        ("See No.1, p.12 and fig.3.", "See number one, page twelve and figure three."),
        ("It is № 5, at 5 Elm St., Boston", "It is Number five, at five Elm Street, Boston"),
        ("3⅛ inches, Elizabeth I ruled.", "three and an eighth inches, Elizabeth the first ruled."),
        ("the XVIIIth or XIXth century", "the eighteenth or nineteenth century"),
        ("open 7 a.m.–5 p.m. daily, or 9am-5pm", "open seven A M to five P M daily, or nine A M to five P M"),
        ("Δx of 30° 15′ 20″ or 4°12′", "delta x of thirty degrees fifteen minutes twenty seconds or four degrees "
         "twelve minutes"),
        ("foo_bar ⋯ so", "foo bar … so"),
    ],
)  # fmt: skip
def test_what_stands_beside_a_number_decides_how_it_is_read(written: str, said: str) -> None:
    assert " ".join(each.text for each in read_words(written.split())) == said


@pytest.mark.parametrize(
    ("written", "right"),
    [
        # Fractions of superscripts and subscripts.
        ("so ²⁄₃ of 3²⁄₃ miles, 1¹⁄₂ cups, ¹⁄₄ cup", "so two thirds of three and two thirds miles, one and a half "
         "cups, a quarter cup"),
        ("H₂O and x² at 1/2", "H two O and x squared at a half"),
        ("2/3rds of it, 5′10″ tall", "two thirds of it, five feet ten inches tall"),
        ("3 kΩ at 100 Mbit/s", "three kilohms at one hundred megabits per second"),
        ("all 3 100,000-ton ships", "all three one hundred thousand-ton ships"),
        ("page 3 100.5 is 12 200-page books", "page three one hundred point five is twelve two hundred-page books"),
        # Units: no plural of hertz; powers as signs, digits and one character.
        ("a 3 GHz chip at 2.4GHz, 50 MHz and 3 km", "a three gigahertz chip at two point four gigahertz, "
         "fifty megahertz and three kilometers"),
        ("5 ㎡, 5 m2, 5 km2, 9.8 m/s², 5.4 g/cm3, 10 kg/m³", "five square meters, five square meters, five square "
         "kilometers, nine point eight meters per second squared, five point four grams per cubic centimeter, ten "
         "kilograms per cubic meter"),
        ("3 V2 rockets, an M2 chip", "three V two rockets, an M two chip"),
        ("+20 ℃ or -20 °C, 5 mail 20", "plus twenty degrees celsius or minus twenty degrees celsius, five mail twenty"),
        ("a 21-cm line, an 80-km (50-mi) ride, a 9-V cell", "a twenty one centimeter line, an eighty kilometer (fifty "
         "mile) ride, a nine volt cell"),
        ("a 5-in-1 tool, a 3-D film, 5 km runs", "a five-in-one tool, a three-D film, five kilometers runs"),
        # Ranges of amounts, and hyphens that are none.
        ("1–2½ cups, 1½-2 cups, ½–¾ cup", "one to two and a half cups, one and a half to two cups, a half to three "
         "quarters cup"),
        ("10%-20%, 20°-30°, 5km-10km, 10:30-11:45", "ten percent to twenty percent, twenty degrees to thirty degrees, "
         "five kilometers to ten kilometers, ten thirty to eleven forty five"),
        ("14th–18th, 1690s–1790s, 10k-20k, US$20–US$30", "fourteenth to eighteenth, sixteen nineties to seventeen "
         "nineties, ten thousand to twenty thousand, twenty dollars to thirty dollars"),
        ("1-1/2 cups, α-2, F-16, 747-400, -5°", "one and a half cups, alpha-two, F-sixteen, seven hundred forty seven "
         "four hundred, minus five degrees"),
        # Numerals: ordinals of kings, numbers of things, letters.
        ("Elizabeth II, John Paul II, John D. Rockefeller III, Leo X", "Elizabeth the second, John Paul the second, "
         "John D Rockefeller the third, Leo the tenth"),
        ("Malcolm X, Apple II, Vatican II, MHC II, angiotensin II", "Malcolm X, Apple two, Vatican two, MHC two, "
         "angiotensin two"),
        ("by example. I will, my part I pray, World War I was, type I cells", "by example. I will, my part I pray, "
         "World War one was, type one cells"),
        ("chapter iv, page xii, pp. ix–x, vol. ii, No. II, book v", "chapter four, page twelve, pages nine to ten, "
         "volume two, Number two, book five"),
        ("figure x, class mix, in vivo, ill (iv)", "figure x, class mix, in vivo, ill (iv)"),
        ("after WWII. In WWI's end, ASCII", "after world war two. In world war one's end, ASCII"),
        ("the volume (V), UX vs. CX, an X", "the volume (V), UX versus CX, an X"),
        ("King George V. He, George I. Sanchez, Helen V. Milner", "King George the fifth. He, George I. Sanchez, Helen "
         "V Milner"),
        ("Division v. Smith, P. v. Riles, Act v. Scene ii", "Division versus Smith, P versus Riles, Act five. "
         "Scene two"),
        # Money before its noun.
        ("a $5 bill, a $10-billion deal, a $2 million house", "a five dollar bill, a ten-billion dollar deal, a two "
         "million dollar house"),
        ("the $500 received, a $5-a-day pass, $50 million-a-year", "the five hundred dollars received, a five "
         "dollars-a-day pass, fifty million dollars-a-year"),
        ("$5 dollars, $800 billion dollars, a $1 million to", "five dollars, eight hundred billion dollars, a one "
         "million dollars to"),
        # Thousands apart, letters, streets.
        ("1 000 000 men, £5 000 000. Then 12 345 678 on page 5 100 ran", "one million men, five million pounds. Then "
         "twelve million three hundred forty five thousand six hundred seventy eight on page five one hundred ran"),
        ("5 000, 6 000", "five thousand, six thousand"),
        ("4K TV, a 10K race, 401K, 5k men, $4K", "four k TV, a ten k race, four hundred one k, five thousand men, four "
         "thousand dollars"),
        ("at 5th St. NW or St. Nicholas", "at fifth Street NW or Saint Nicholas"),
        ("(pause) so (Applause.) it (the pause) is", "so it (the pause) is"),
    ],
)  # fmt: skip
def test_kinds_that_were_read_wrongly_and_their_neighbours(written: str, right: str) -> None:
    assert said(written) == right


def test_a_raised_number_is_a_power_a_footnote_or_refused() -> None:
    powers = "x² mc² km² 10² 10⁻³ 5 m² 3² = 9 and 2^10 (a + b)² = x AB² + BC²"
    assert said(powers) == (
        "x squared mc squared km squared ten squared ten to the minus three five square meters three squared equals "
        "nine and two to the tenth (a plus b) squared equals x AB squared plus BC squared"
    )
    notes = "12¹ $5¹ $5² 1812³, Chapter 5² May 5² US² it² king's² 5th² (in 1901)²"
    assert said(notes) == (
        "twelve five dollars five dollars eighteen twelve, Chapter five May five US it king's fifth "
        "(in nineteen oh one)"
    )
    assert unsaid_signs(notes) == "¹¹²³²²²²²²²"
    for text in ("there were 25² of them", "aged 16³ then"):
        with pytest.raises(BadInput, match="may be a power or the mark of a footnote"):
            read_words(text.split())


@pytest.mark.parametrize("text", [
    "it has 12 345 people", "they said 100 200 300 then", "about 10 000–20 000 people", "5 000-6 000", "1 000,50",
    "at $1 000.5 now", "1 000 1 000",
])  # fmt: skip
def test_numbers_that_may_be_one_or_several_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="may be one number or several"):
        read_words(text.split())


def test_the_times_of_spaced_thousands_belong_to_their_words() -> None:
    one, *groups, men = read_words(["1", "000", "000", "men"])
    assert (one.text, men.text) == ("one million", "men")
    assert [(group.text, group.tokens, group.unsaid) for group in groups] == [("", [], "")] * 2


def test_written_words_of_the_cases_have_their_right_reading(cases: Path) -> None:
    for line in (cases / "text" / "spoken_tokens.jsonl").read_text().splitlines():
        case = json.loads(line)
        if "BadInput" in case["right"]:
            if "leave out" in case["right"]:
                assert first_readings(case["written"]) == "", case
                continue
            with pytest.raises(BadInput, match="no English reading"):
                read_words(case["written"].split())
            continue
        right = re.split(" / |; |\\(", case["right"])
        first = first_readings(case["written"]).removeprefix("chapter ")
        assert first in [one.strip() for one in right], case


def test_texts_of_the_cases_are_said_right(cases: Path) -> None:
    expected = {
        "$3.50": "three dollars and fifty cents", "$40": "forty dollars", "3/4": "three quarters", "VIII": "the eighth",
        "vs.": "versus", "No. 1": "Number one", "Ph.D.": "P H D", "10-15": "ten to fifteen",
        "50℃": "fifty degrees celsius", "①": "one and two", "Ａ": "A B C", "5′": "five feet two inches",
        "§": "section five", "St. in": "Main Street",
    }  # fmt: skip
    texts = [json.loads(line)["text"] for line in (cases / "text" / "synthesis.jsonl").read_text().splitlines()]
    for part, right in expected.items():
        [text] = [text for text in texts if part in text]
        assert right in said(text)
    with pytest.raises(BadInput):
        said(next(text for text in texts if "水" in text))
