"""Documents → passages that can be spoken: whole consecutive sentences up to a length, no code, tables or formulas.

What cannot be spoken is cut out, line by line and sentence by sentence, and no passage reaches across a cut. Web text
is plentiful, so what is doubtful is cut too: a passage's text must be what a synthesizer says.
"""

from __future__ import annotations

import html
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from salad_ray.names import INGEST
from salad_ray.speech.spoken import is_unsaid, unreadable
from salad_ray.tables import Passage, Reject
from salad_ray.text.documents import Document

ROUNDING = 1e-9
SPECIAL_PIECES = 2
"""[CLS] and [SEP], which a sentence encoder puts around a passage, count towards its limit."""
FRAGMENT_WORDS = 8
"""A line without an end mark is a heading or the item of a list if it has fewer words, else a sentence."""
WRAPPED_CHARS = 130
"""Lines of plain text files are broken below this width; longer ones are paragraphs."""
NORMALIZED_CHARS = 1024
"""Of a text that are normalized at once: marks that pile up on one letter are sorted in quadratic time."""
MAX_UNCLOSED = 64
"""Kinds of blocks that are searched for and never closed, after which a document is taken to have none."""

# A text may be one line of many megabytes, of whatever signs. So no pattern may begin anew at each sign of a run that
# it has read already: it begins where a run does, or stops where it could begin again.

CODE, TABLE, FORMULA, LINK, MARKUP = "code", "table", "formula", "link or address", "markup"
FRAGMENT, BOILERPLATE, CAPITALS = "heading, list item or part of a sentence", "boilerplate", "capitals"
SCRIPT, NUMBERS, SYMBOLS = "other script", "numbers", "symbols"
SHORT, LONG, REFERENCE = "too short", "sentence too long", "reference"
EMPTY = "nothing but marks and white space"

Counts = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True)
class Limits:
    """Of a passage. `max_word_pieces` includes the two special ones; words are separated by white space."""

    max_word_pieces: int = 256
    max_words: int = 341
    min_words: int = 8


class Cut(NamedTuple):
    """A document's passages; or, if there are none, one reject with the main reason.

    `cut_chars`: reason → characters that were left out, of kept and of rejected documents.
    """

    passages: list[Passage]
    rejects: list[Reject]
    cut_chars: dict[str, int]


class Unit(NamedTuple):
    """What is never divided: a sentence, or a clause of one that is too long."""

    text: str
    num_words: int
    num_pieces: int


def cut_passages(document: Document, limits: Limits, count_pieces: Counts | None = None) -> Cut:
    """Cut a document into passages of consecutive sentences, as few and as equal in length as the limits allow.

    Text becomes Unicode NFC with single spaces; Markdown and HTML marks are taken off. A sentence that is too long is
    divided at clauses if that leaves at least `min_words` on both sides; a line without an end mark gets a full stop.

    Args:
        count_pieces: word pieces of each text, without special ones, that add up when texts are joined by a space;
            unset: `estimated_word_pieces`.
    """
    cut: Counter[str] = Counter()
    texts = list(_sentences_of(document.text, cut))
    passages: list[Passage] = []
    for run in _runs(texts, limits, count_pieces or estimated_word_pieces, cut):
        passages += _passages(run, limits, document, len(passages), cut)
    rejects = [] if passages else [Reject(INGEST, document.doc_id, _main_reason(cut))]
    return Cut(passages, rejects, dict(cut))


def _main_reason(cut: Counter[str]) -> str:
    return f"nothing to speak: mostly {cut.most_common(1)[0][0]}" if cut else f"nothing to speak: {EMPTY}"


def estimated_word_pieces(texts: Sequence[str]) -> list[int]:
    """WordPiece tokens of English texts (BERT's uncased vocabulary, as MiniLM's), estimated from above.

    Of 12,000 passages of 15 domains 99.5 % have fewer; the estimate is 24 % above the truth in the median. Its weights
    are a regression's for the upper quantile.
    """
    return [_estimate(text) for text in texts]


_MARKS = string.punctuation.encode()
_LONG = re.compile(r"[A-Za-z]{9,}")


def _estimate(text: str) -> int:
    data = text.encode("utf-8", "replace")
    num_words, num_marks = text.count(" ") + 1, len(data) - len(data.translate(None, _MARKS))
    long_words = _LONG.findall(text)
    num_very_long = sum(len(word) > 12 for word in long_words)
    pieces = 1.06 * num_words + 1.8 * num_marks + 1.65 * len(long_words) + 2.5 * num_very_long
    return math.ceil(pieces + 0.7 * (len(data) - len(text)))


# --- Filling passages -------------------------------------------------------------------------------------------------


def _runs(texts: Sequence[str], limits: Limits, count_pieces: Counts, cut: Counter[str]) -> list[list[Unit]]:
    """Runs of units that nothing was cut out between."""
    counts = iter(count_pieces([text for text in texts if text]))
    runs: list[list[Unit]] = [[]]
    for text in texts:
        units = _fitting(_unit(text, next(counts)), limits, count_pieces) if text else []
        if units:
            runs[-1] += units
            continue
        runs.append([])
        if text:
            cut[LONG] += len(text)
    return runs


def _unit(text: str, num_pieces: int) -> Unit:
    return Unit(text, text.count(" ") + 1, num_pieces)


def _fitting(unit: Unit, limits: Limits, count_pieces: Counts) -> list[Unit]:
    """The unit, or its clauses if it is too long, or nothing if one of those is too."""
    if _fits(unit, limits):
        return [unit]
    halves = _halves(unit.text, limits.min_words)
    fitting = [_fitting(_unit(*half), limits, count_pieces) for half in zip(halves, count_pieces(halves), strict=True)]
    return [part for parts in fitting for part in parts] if all(fitting) else []


_CLAUSE_END = re.compile(r"(?<=[;:,—])[\"”’)]? ")


def _halves(text: str, min_words: int) -> list[str]:
    """A sentence divided at the clause end next to its middle, rather not at a comma; [] if no end leaves enough."""
    ends, here, num_before, num_words = [], 0, 0, text.count(" ") + 1
    for match in _CLAUSE_END.finditer(text):
        num_before += text.count(" ", here, match.end())
        here = match.end()
        if num_before >= min_words <= num_words - num_before:
            ends.append(here)
    if not ends:
        return []
    end = min(ends, key=lambda end: abs(2 * end - len(text)) * (1.5 if text[end - 2] == "," else 1))
    return [text[:end].rstrip(), text[end:]]


def _fits(unit: Unit, limits: Limits) -> bool:
    return unit.num_words <= limits.max_words and unit.num_pieces <= _room(limits)


def _room(limits: Limits) -> int:
    return limits.max_word_pieces - SPECIAL_PIECES


def _passages(run: list[Unit], limits: Limits, document: Document, first: int, cut: Counter[str]) -> list[Passage]:
    passages: list[Passage] = []
    for start, end in _balanced(run, limits):
        text = " ".join(unit.text for unit in run[start:end])
        if text.count(" ") + 1 < limits.min_words:
            cut[SHORT] += len(text)
        else:
            passages.append(_passage(document, first + len(passages), text))
    return passages


def _balanced(run: Sequence[Unit], limits: Limits) -> list[tuple[int, int]]:
    """Divide a run of units, each of which fits, into passages [start, end) of the least sum of squared room left.

    So passages are few and none is a tail: 1.2 times the limit becomes twice 0.6.
    """
    sizes = [(unit.num_words / limits.max_words, unit.num_pieces / _room(limits)) for unit in run]
    cost, previous = [0.0], [0]
    for end in range(1, len(run) + 1):
        best, at, words, pieces = math.inf, end - 1, 0.0, 0.0
        for start in range(end - 1, -1, -1):
            words += sizes[start][0]
            pieces += sizes[start][1]
            room = 1 - (words if words > pieces else pieces)
            if room < -ROUNDING:
                break
            if (total := cost[start] + room * room) < best:
                best, at = total, start
        cost.append(best)
        previous.append(at)
    bounds = [len(run)]
    while bounds[-1] > 0:
        bounds.append(previous[bounds[-1]])
    bounds.reverse()
    return list(pairwise(bounds))


def _passage(document: Document, index: int, text: str) -> Passage:
    return Passage(
        passage_id=f"{document.doc_id}#{index}",
        doc_id=document.doc_id,
        text=text,
        source=document.doc_id,
        url=document.url,
        license=document.license,
        domain=document.domain,
    )


# --- Lines and sentences ----------------------------------------------------------------------------------------------


def _sentences_of(text: str, cut: Counter[str]) -> Iterator[str]:
    """The sentences that can be spoken, in their order, and "" wherever something was cut out between them."""
    for paragraph, reason in _paragraphs(_normalized(text)):
        plain = "" if reason else _without_marks(paragraph, cut)
        reason = reason or _paragraph_fault(plain)
        if reason:
            cut[reason] += len(paragraph)
            yield ""
            continue
        for index, sentence in enumerate(split_sentences(plain)):
            is_rest = index == 0 and _CUT_OFF.match(sentence)
            if fault := FRAGMENT if is_rest else _sentence_fault(sentence):
                cut[fault] += len(sentence)
                yield ""
            else:
                yield sentence if sentence.endswith(":") or _FINAL.search(sentence) else f"{sentence.rstrip(_LOOSE)}."


# Each part ends before an ASCII character, which nothing is composed with that precedes it.
_PARTS = re.compile(rf".{{1,{NORMALIZED_CHARS}}}[^\x00-\x7f]{{0,{NORMALIZED_CHARS}}}", re.DOTALL)


def _normalized(text: str) -> str:
    """Unicode NFC, but where `NORMALIZED_CHARS` follow each other without an ASCII one perhaps at one place not."""
    return text if text.isascii() else "".join(unicodedata.normalize("NFC", part) for part in _PARTS.findall(text))


_LOOSE = " ,;-–—"
_FINAL = re.compile(r"""[.!?…][\"”’')\]»]*$""")

_OPENING = re.compile(
    r"^[ \t]*(?P<fence>```|~~~)|<(?P<tag>pre|script|style|code|svg|table|math)\b|(?P<comment><!--)"
    r"|\\begin\{(?P<environment>\w+\*?)\}|(?P<display>\$\$)|(?P<bracket>\\\[)",
    re.MULTILINE | re.IGNORECASE,
)
_OPENING_SIGNS = ("```", "~~~", "<", "\\", "$$")
_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]"
)


def _paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """(paragraph, "") or (what was cut out, reason), in their order."""
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n"))
    position = 0
    for start, end, reason in _blocks(text):
        yield from _lines(text[position:start])
        yield text[start:end], reason
        position = end
    yield from _lines(text[position:])


def _blocks(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, reason) of what is marked as no prose from beginning to end; what is never closed is none."""
    if not any(sign in text for sign in _OPENING_SIGNS):
        return
    position, unclosed = 0, set()
    for opening in _OPENING.finditer(text):
        closing, reason = _closing(opening)
        if opening.start() < position or closing in unclosed:
            continue
        end = text.find(closing, opening.end())
        if end < 0:
            unclosed.add(closing)
            if len(unclosed) > MAX_UNCLOSED:
                return
            continue
        position = end + len(closing)
        yield opening.start(), position, reason


def _closing(opening: re.Match[str]) -> tuple[str, str]:
    if fence := opening["fence"]:
        return f"\n{fence}", CODE
    if tag := opening["tag"]:
        return f"</{tag}>", {"table": TABLE, "math": FORMULA}.get(tag.lower(), CODE)
    if opening["comment"]:
        return "-->", MARKUP
    if environment := opening["environment"]:
        return f"\\end{{{environment}}}", FORMULA
    return "$$" if opening["display"] else "\\]", FORMULA


def _lines(text: str) -> Iterator[tuple[str, str]]:
    for block in re.split(r"\n[ \t]*\n", text):
        joined = ""
        lines = [line for line in block.split("\n") if line.strip()]
        widest = _column_width(lines)
        for line in lines:
            if reason := _line_fault(line):
                if joined:
                    yield joined, ""
                yield line.strip(), reason
                joined = ""
            elif joined and _continues(joined[joined.rfind("\n") + 1 :], line, widest):
                joined += f"\n{line}"
            else:
                if joined:
                    yield joined, ""
                joined = line
        if joined:
            yield joined, ""


_ITEM = re.compile(r"\s*(?:[-*+•▪◦‣●■○·–—]|\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,5})[.)]|#{1,6})\s+")


def _continues(before: str, line: str, widest: int) -> bool:
    """Whether a line break is not the end of a paragraph but of a column of plain text, or within a sentence."""
    if _ITEM.match(line):
        return False
    if line.lstrip()[:1].islower() and not _FINAL.search(before.rstrip()):
        return True
    return bool(widest) and len(before) > 0.6 * widest


def _column_width(lines: Sequence[str]) -> int:
    """Width of a column that lines are broken at, many of them within sentences; 0 if each is a paragraph."""
    widest = max(map(len, lines), default=0)
    num_inside = sum(line.lstrip()[:1].islower() for line in lines)
    return widest if 40 < widest <= WRAPPED_CHARS and num_inside >= len(lines) / 4 else 0


_CODE_LINE = re.compile(
    r"""
    ^\s*(?:>>>\s|\$\s+[a-z]|//|/\*|\*/|\#!|\#\s*(?:include|define|ifn?def|pragma)\b|@\w+(?:\(|\s*$)|<\?php|<!DOCTYPE)
    | [{}]\s*(?:[;,]\s*)?$ | (?<=[\w)\]"']);$ | \)\s*(?:\{|=>|->)
    | (?:==|!=|=>|->|::|\+=|-=|&&|\|\||:=|</|/>|\w\(\)|\[\]|\[\w+\]\s*=|\w\.\w+\(|\$\{
      |\w\(\w+(?:,\s*\w+)*\)\s*[;:{]\s*$)
    | ^\s*(?:def|class|import|from|return|if|for|while|elif|else|try|except|raise|with|public|private|protected|static
          |void|int|float|double|char|bool|var|let|const|function|fn|func|struct|enum|impl|use|using|namespace|package
          |print|printf|echo|sudo|SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER)\b(?=.*[(){}\[\]=:;<>\#])
    | ^\s*[\w.\[\]"']+\s*[-+*/|&]?=\s*\S | ^\s*["']?[\w-]+["']?\s*:\s*(?:["'\[{]|\d+,?$|true\b|false\b|null\b)
    | ^(?:\s{4,}|\t+)\S
    """,
    re.VERBOSE,
)
_COLUMNS = re.compile(r"\S {3,}\S")
_PROSE = re.compile(r"(?<![a-z])[a-z]{2,} [a-z]{2,} [a-z]{2}")
_LINKS = re.compile(r"\]\(|<a\s|https?://")
_CODE_SIGNS = b"{}[]=<>_/\\|&$#`@+*~();:"
WORDS_PER_SIGN = 8


def _line_fault(line: str) -> str:
    """Why a line as it stands, with its indentation, is no prose; "" if it may be."""
    stripped = line.strip()
    if "\t" in stripped or stripped.count("|") > 1 or len(_COLUMNS.findall(stripped)) > 1:
        return TABLE
    if len(_LINKS.findall(line)) > 2:
        return LINK
    if "<" in line:
        line = _TAG.sub("", line)
    num_words = stripped.count(" ") + 1
    data = line.encode("utf-8", "replace")
    num_signs = len(data) - len(data.translate(None, _CODE_SIGNS)) + line[:1].isspace()
    if num_signs * WORDS_PER_SIGN < num_words:
        return ""
    num_signs = len(_CODE_LINE.findall(line))
    # A long line of prose may name some code, which is for its sentences to answer for.
    is_code = num_signs > 1 or (num_signs == 1 and not _PROSE.search(line))
    return CODE if is_code and num_signs * WORDS_PER_SIGN > num_words else ""


_IMAGE = re.compile(r"!\[[^\[\]\n]*\]\([^()\n]*\)")
_LINK_MARK = re.compile(r"\[([^\[\]\n]*)\]\((?:[^()\n]|\([^()\n]*\))*\)|\[([^\[\]\n]+)\]\[[^\[\]\n]*\]")
_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>")
_NOTE = re.compile(
    r"\s?\[(?:\^?\d{1,3}(?:[,–-]\s?\d{1,3})*|\^\w+|[a-z]|edit|citation needed|note \d+|…|\.\.\.)\]", re.I
)
_BOLD = re.compile(r"(\*\*\*|\*\*|__)(?=\S)((?:(?!\1).)++)(?<=\S)\1")
_EMPHASIS = re.compile(r"(?<![\w*_\\])([*_])(?=[^\s*_])([^*_]+?)(?<=\S)\1(?![\w*_])")
_CODE_WORD = re.compile(r"`([A-Za-z][A-Za-z'-]*(?: [A-Za-z'-]+){0,5})`")
_OLD_QUOTE = re.compile(r"(?<!\w)`(?=\w[^`]*')")
_EMPTY_BRACKETS = re.compile(r"\s\((?:see|e\.g\.|cf\.)?[\s,;]*\)")
_HEADING_END = re.compile(r"(?<!\s)\s+#+\s*$")
_ESCAPED = re.compile(r"\\([\\`*_{}\[\]()#+.!|>~-])")
_DECORATION = re.compile(r"[\u2600-\u27bf\ufe0f\u200d\u21a9\u2b00-\u2bff\U0001f000-\U0001faff®™©†‡¶•■●▪]")
"""What is taken off beside the signs that nobody says (`is_unsaid`)."""


def _without_marks(paragraph: str, cut: Counter[str]) -> str:
    """A paragraph without the marks of Markdown, HTML, lists and references, on one line."""
    text = paragraph
    if "&" in text and ";" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", text)
    if "](" in text or "][" in text:
        text = _LINK_MARK.sub(lambda found: found[1] or found[2] or "", _IMAGE.sub("", text))
    if "[" in text:
        text = _NOTE.sub("", text)
    text = text.lstrip("> \t")
    if item := _ITEM.match(text):
        text = text[item.end() :]
    if "*" in text or "_" in text:
        text = _EMPHASIS.sub(r"\2", _BOLD.sub(r"\2", text))
    if "`" in text:
        text = _OLD_QUOTE.sub("‘", _CODE_WORD.sub(r"\1", text.replace("``", "“").replace("''", "”")))
    if "(" in text:
        text = _EMPTY_BRACKETS.sub("", text)
    if "\\" in text:
        text = _ESCAPED.sub(r"\1", text)
    if "#" in text:
        text = _HEADING_END.sub("", text)
    if not text.isascii():
        signs = {sign for sign in set(text) if _DECORATION.match(sign) or is_unsaid(sign)}
        if signs:
            cut[SYMBOLS] += sum(map(text.count, signs))
            text = text.translate(dict.fromkeys(map(ord, signs)))
    return " ".join(text.split())


_BOILERPLATE = re.compile(
    r"""^(?:copyright\b|all\ rights\ reserved|click\ (?:here|on)|sign\ (?:up|in)\b|subscribe|log\ ?in\b|register\b
    |share\ (?:this|on)|follow\ us|read\ more|skip\ to|back\ to\ top|this\ (?:web)?site\ uses|we\ use\ cookies
    |accept\ (?:all\ )?cookies|privacy\ policy|terms\ of\ (?:use|service)|please\ enable|javascript|advertisement
    |posted\ (?:by|on|in)|filed\ under|tagged|comments?\b|leave\ a|your\ email|related\ (?:posts|articles)
    |home\ ?[>»|]|print\ this|download\b)""",
    re.VERBOSE | re.IGNORECASE,
)
BOILERPLATE_WORDS = 25
_REFERENCE = re.compile(r"(?:\[?\d+[\].]? )?[A-Z][\w’'-]+,(?: ?[A-Z]\.)+.{0,200}?\b(?:1[6-9]|20)\d\d\b")


def _paragraph_fault(text: str) -> str:
    """Why a paragraph without its marks is not spoken; "" if it may be."""
    num_words = text.count(" ") + 1
    letters = sum(map(str.isalpha, text)) if len(text) < 200 else len(text)
    if letters < 2:
        return SYMBOLS
    if num_words <= BOILERPLATE_WORDS and _BOILERPLATE.match(text):
        return BOILERPLATE
    if _REFERENCE.match(text):
        return REFERENCE
    if text.isupper() and num_words > 1:
        return CAPITALS
    if num_words < FRAGMENT_WORDS and not _FINAL.search(text):
        return FRAGMENT if text.isascii() or not _OTHER_SCRIPT.search(text) else SCRIPT
    return ""


_OTHER_SCRIPT = re.compile(
    r"(?:[\u0370-\u1cff\u1f00-\u1fff\u2c00-\ud7ff\uf900-\ufaff\ufe70-\ufefc\uff66-\uffdc]|[\U00010000-\U0003ffff]){2}"
)
_FAULT = re.compile(
    r"""
    (?P<link>https?:|www\.|\w@\w|\B[@\#][A-Za-z]\w+|(?<![\w-])-*\w[\w-]*\.(?:com|org|net|gov|edu|io|co\.uk|html?|php)\b)
    | (?P<script>{OTHER_SCRIPT})
    | (?P<formula>\\[A-Za-z(\[]|[=≤≥≈≠≡±×÷⁄∑∏∫√∞∂∇∈∉⊂⊆∪∩∧∨¬∀∃→⇒⇔←↔^⨯∝∼⋅₀-₉⁰-⁹]|\$[^$\d\s][^$]*\$
        |(?<=\w)\ [+*<>]\ (?=\w))
    | (?P<code>[{}`~]|\w_\w|\w\(\)|::|[a-z]\.[a-z]{2,}\(|\w->\w|(?:^|[\s(])[~.]{0,2}/\w+|//|":\s
        |\b(?=\w+[a-z][A-Z])\w++\(|\s--?[a-z]+=)
    | (?P<markup></?[a-z]+|[<>|\\]|\[\[|\]\]|\*\*|\(\s*\)|&\w+;)
    | (?P<symbols>[\ufffd\u0250-\u036f\ue000-\uf8ff\u2500-\u25ff]|[âÃ][\x80-\xbf€™œ]
        |(?P<mark>[^\w\s.])(?P=mark){3,}|_{2,}|\.{5,})
    """.replace("{OTHER_SCRIPT}", _OTHER_SCRIPT.pattern),
    re.VERBOSE,
)
# Hardly a sentence has one of these, and they are found quickly.
_ODD = re.compile(r"[^A-Za-z0-9 ,.'’\"“”‘;:?!()—–-]")
_INNER_STOP = re.compile(r"\.[A-Za-z.]{2}|\(\)|::|\":")
_REASONS = {"link": LINK, "script": SCRIPT, "formula": FORMULA, "code": CODE, "markup": MARKUP, "symbols": SYMBOLS}
_NUMBER = re.compile(r"[0-9][^ ]*")
_CAPITAL_WORD = re.compile(r"[A-Z]{2,}")
_CUT_OFF = re.compile(r"[a-z]{2}|[,;:.)]")
_WORD = re.compile(r"[^\W\d_]{2}")
MAX_WORD_CHARS = 35
_LONG_WORD = re.compile(rf"[^\s—–/-]{{{MAX_WORD_CHARS}}}")


def _sentence_fault(sentence: str) -> str:
    """Why a sentence cannot be spoken; "" if it can."""
    if (_ODD.search(sentence) or _INNER_STOP.search(sentence)) and (found := _FAULT.search(sentence)):
        return next(_REASONS[name] for name in _REASONS if found[name])
    if sign := unreadable(sentence):
        return SCRIPT if sign.isalpha() else SYMBOLS
    words = sentence.split(" ")
    if max(map(len, words)) > MAX_WORD_CHARS and _LONG_WORD.search(sentence):
        return SYMBOLS
    num_words = len(words)
    if len(_NUMBER.findall(sentence)) > max(3, 0.4 * num_words):
        return NUMBERS
    if len(_CAPITAL_WORD.findall(sentence)) > max(3, 0.5 * num_words):
        return CAPITALS
    return "" if _WORD.search(sentence) else SYMBOLS


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


# An abbreviation here is followed by what belongs to it, …
_TITLES = _words(
    "Mr Mrs Ms Dr Prof Rev Hon Gen Col Capt Lt Sgt Maj Cmdr Adm Gov Sen Rep Pres St Ste Mt Ft Messrs Mme Mlle Fr Br Sr",
    "vs v viz cf e.g i.e eg ie ca approx Univ Assn Dept Bros esp incl resp",
)
# … here only by a number or a letter, …
_NUMBERED = _words("No Nos no nos Vol vol Fig Figs fig figs Eq eq Sec sec Ch ch Art art pp p Pt pt Ex Op Chap")
# … and here it may end a sentence: it does if the next word often begins one.
_AMBIGUOUS = _words(
    "Jr Inc Co Corp Ltd etc al Jan Feb Mar Apr Jun Jul Aug Sept Sep Oct Nov Dec Ave Blvd Rd Ph.D M.D B.A M.A B.Sc",
    "Calif Mass Conn Penn Va Pa Tenn ed eds trans ft in lb oz sq min max hr sec a.m p.m A.M P.M",
)
_STARTERS = _words(
    "The A An In It This That These Those He She They We You I But And Or So If When While As At On For By To From",
    "With After Before However Although Because There Here What Who Why How Where Since During Its His Her Their Our",
    "My Your Each Some Many Most All Both Not One Two Then Thus Also Another Such Now Yet Even Only Once Under Over",
    "Through Between Among Until Unlike Like Despite Today Later Several Few Other Others Every Nor Is Are Was Were Do",
    "Does Did Moreover Furthermore Therefore Meanwhile Instead Finally First Second Third Perhaps Indeed",
)
_END = re.compile(r"""(?<![.!?…])([.!?…]+)([\"”’')\]»]*)\ (?=[\"“‘'(\[«]*([A-Z0-9À-Þ][\w’']*)(.?))""")
_SPEECH_TAG = re.compile(
    r"(?:[A-Z]\w+|I)(?: [A-Z]?\w+){0,2}? (?:said|asked|cried|replied|answered|exclaimed|whispered|shouted|returned|"
    r"remarked|observed|demanded|inquired|thought)\b"
)
_ROMAN = re.compile(r"[IVXLC]+")
_INITIALS = re.compile(r"(?:[A-Za-z]\.)*[A-Za-z]")


def split_sentences(text: str) -> list[str]:
    """Sentences of a paragraph that is on one line; where it is doubtful whether one ends, it does not."""
    sentences, start = [], 0
    for end in _END.finditer(text):
        if _is_end(text, end):
            sentences.append(text[start : end.end() - 1])
            start = end.end()
    sentences.append(text[start:])
    return [sentence for sentence in sentences if sentence]


def _is_end(text: str, end: re.Match[str]) -> bool:
    marks, closing, following, after = end[1], end[2], end[3], end[4]
    if marks != ".":
        return not (closing and _SPEECH_TAG.match(text, end.end()))
    before = text[text.rfind(" ", 0, end.start()) + 1 : end.start()].lstrip("\"“‘'([«—-")
    if before in _TITLES:
        return False
    if before in _NUMBERED and (following[0].isdigit() or len(following) == 1 or _ROMAN.fullmatch(following)):
        return False
    if before in _AMBIGUOUS or _INITIALS.fullmatch(before):
        return following in _STARTERS and after != "."
    return True
