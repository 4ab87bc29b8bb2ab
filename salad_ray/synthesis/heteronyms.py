"""Words that sound as their part of speech or their sense demands: "He read it", "to close", "used to", "made of lead".

eSpeak NG has rules for the commonest of them only. misaki, whose phonemes Kokoro was trained on, has a table of forms
by part of speech. The parts of speech come from gruut's tagger (a CRF over two words to either side, trained on the
English Web Treebank), whose model a package brings along, while spaCy's would have to be downloaded. Grammar decides
before it: a clause has a verb, a determiner none behind it. Senses of one part of speech ("bass", "bow") are told by
the words beside them.
"""

from __future__ import annotations

import base64
import importlib.resources
import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

MIN_CERTAINTY = 0.6
"""Of a form, among those of all parts of speech that a word may be; below it the word stays as eSpeak has it."""
_TAGS = {"DEFAULT", "NOUN", "VERB", "ADJ", "ADV", "VBD", "VBN", "VBP"}
_NEVER_NOUNS = ("closer", "consist", "consists", "affect", "affects")
"""What the tagger takes for nouns in "a closer look" and "it consists of", though they hardly ever are."""
_PARENTS = {"VB": "VERB", "NN": "NOUN", "JJ": "ADJ", "RB": "ADV"}
_FINITE = ("VBZ", "VBD", "VBP", "MD")
_TOKEN = re.compile(r"\w+(?=n['’]t\b)|n['’]t\b|['’](?:s|ll|re|ve|d|m)\b|\w+(?:['’-]\w+)*?(?=n?['’]\w+\b|\b)|[^\w\s]")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_DETERMINERS = _set("a an the my your his its our their no every each another")
_OBJECTS = _set("me us him them it myself yourself himself herself itself ourselves themselves")
_NO_SUBJECTS = _set("at in of for by with on from into to under without as than")
_PLURALS = _set("people men women children police cattle mice bacteria data media folk species we they you i who")
_CLAUSE_STARTS = _set("because although though if unless while when whenever where that which until whether but since")
_BE = _set(
    "be is are was were am been being seem seems seemed feel feels felt look looks looked remain remains "
    "remained become becomes became grow grew get got stay stayed appear appears appeared"
)
_VERY = _set("very so too quite extremely rather not perfectly more less most truly fully")
_COMPLEMENTED = _set(
    "keep keeps kept keeping hold holds held holding leave leaves left consider considers considered find finds "
    "found deem deems deemed"
)
_LEAD_THINGS = _set(
    "poisoning pipe pipes paint paints acid shot bullet bullets ore ores mine mines pencil pencils battery "
    "batteries glass oxide weight weights ingots levels roof coffin crystal solder bars salts ions atoms "
    "exposure contamination dust sheet sheets shielding acetate carbonate sulfide nitrate plates cable glaze "
    "content concentrations isotopes"
)
_METALS = _set(
    "zinc copper iron tin mercury arsenic cadmium chromium nickel toxic poisoning metal metals gasoline petrol "
    "solder ore mined melted molten paint pipes plumbing radioactive uranium antimony bullets"
)
_FISH = _set(
    "fish fishing fished caught catch lake river sea pond water waters stream striped largemouth smallmouth "
    "trout perch pike salmon spawn bait angler anglers hook lure grilled cooked fillet fried freshwater walleye "
    "bluegill carp cod reservoir"
)
_SHIP = _set(
    "ship ships boat boats vessel vessels stern deck hull sail sails sailed canoe kayak port starboard waves "
    "ferry yacht rudder mast anchor"
)
_LOW = _set("low deep slight polite final formal courtly little graceful stiff mock respectful")
_QUARREL = _set("terrible blazing furious heated public political diplomatic bitter violent fierce flaming huge")
_RIPPED = _set("muscle ligament meniscus cartilage tendon cuff retinal labral hamstring calf aortic")
_FACE = _set("eye eyes cheek cheeks face lashes")
_SMALL = _set(
    "amount amounts quantity quantities detail details trace traces fraction difference differences scale "
    "portion speck particle particles crack cracks proportion"
)
_AXES = _set(
    "axis coordinate coordinates x y z graph plot chart rotation crystal symmetry horizontal vertical principal "
    "major minor perpendicular optical labeled label scale ellipse"
)
_HABIT = _set("every always often usually sometimes daily rarely seldom never")
_PAST = _set("yesterday ago last once had was were then")
_NUMBERS = _set(
    "one two three four five six seven eight nine ten twelve fifteen twenty thirty forty fifty sixty ninety a "
    "per hundred half each every last this another few"
)


@dataclass(frozen=True)
class _Word:
    """Of a sentence: in lower case, without punctuation; its likeliest tag, and how likely each is; what ends it."""

    plain: str
    tag: str
    masses: dict[str, float]
    is_name: bool
    ends_clause: bool
    ends_sentence: bool

    def mass(self, *kinds: str) -> float:
        return sum(mass for tag, mass in self.masses.items() if tag.startswith(kinds))

    @property
    def is_noun(self) -> bool:
        return self.mass("NN", "JJ") > self.mass("VB")


_NOTHING = _Word("", "", {}, False, True, True)


def in_context(words: Sequence[str], sounds: Sequence[str], british: bool) -> list[str]:
    """The sounds of a sentence's words, with those of heteronyms that have another form there.

    Args:
        words: with the punctuation around them.
        sounds: of each word, as eSpeak has them; a word without any is left as it is.
    """
    known = _forms(british)
    plain = [word.strip(string.punctuation + "“”‘’…—").lower() for word in words]
    if not any(word in known for word in plain):
        return list(sounds)
    sentence = _tagged(words, plain)
    result = list(sounds)
    for index, word in enumerate(plain):
        if (forms := known.get(word)) and sounds[index]:
            form = _form(sentence, index, forms)
            if form and form not in _nearest(sounds[index], forms):
                result[index] = form
    return result


def _form(sentence: Sequence[_Word], index: int, forms: dict[str, str]) -> str:
    """The form of a word, "" if none is certain."""
    word, following = sentence[index], _at(sentence, index + 1)
    kind = _kind(sentence, index) if word.plain != "axes" else ""
    if kind[:2] != "VB" and (sense := _sense(sentence, index)) in forms:
        return forms[sense]
    if kind == "NN" and "NOUN" not in forms and word.plain.endswith("ate"):  # "a moderate"
        kind = "JJ"
    if kind:
        return _of_tag(word.plain, kind, following, forms)
    votes: dict[str, float] = {}
    for tag, mass in word.masses.items():
        form = _of_tag(word.plain, tag, following, forms)
        votes[form] = votes.get(form, 0.0) + mass
    best = max(votes, key=lambda form: votes[form])
    return best if votes[best] >= MIN_CERTAINTY * max(sum(votes.values()), MIN_CERTAINTY) else ""


def _of_tag(word: str, tag: str, following: _Word, forms: dict[str, str]) -> str:
    if word == "used":  # "used to go", "was used to it"; "was used to make it", "a tool used to cut" have the other one
        is_habit = (tag in ("VBD", "JJ") and following.plain == "to") or (following.plain, following.tag) == (
            "to",
            "IN",
        )
        return forms["VBD" if is_habit else "DEFAULT"]
    if tag == "VBP" and "VBD" in forms and word.endswith("read"):  # "they read it daily"
        return forms["DEFAULT"]
    return forms.get(tag) or forms.get(_PARENTS[tag[:2]]) or forms["DEFAULT"]


def _kind(sentence: Sequence[_Word], index: int) -> str:
    """A tag of the part of speech that grammar demands, "" if it leaves that to the tagger."""
    word, before, after = sentence[index], _at(sentence, index - 1), _at(sentence, index + 1)
    if word.plain.endswith("read"):
        return _tense(sentence, index)
    if word.plain == "used":
        return _kind_of_used(sentence, index)
    ends = word.ends_clause or after.tag in ("IN", *_FINITE)
    if before.plain in _DETERMINERS and not before.ends_clause:
        joined = after.tag == "CC" and _at(sentence, index + 2).tag in ("", "VB", *_FINITE)
        return "NN" if ends or joined else ""
    if before.plain in _NO_SUBJECTS and before.tag != "TO":
        return "NN" if before.plain in ("of", "for", "by", "with") and ends else ""
    if after.plain in _OBJECTS and not word.ends_clause and not word.mass("VBD", "VBN") > 0.5:
        return "VB"
    start = _clause_start(sentence, index)
    clause = sentence[start : _clause_end(sentence, index)]
    is_behind = any(each.plain in _COMPLEMENTED for each in clause[: index - start])
    if is_behind and before.tag != "TO" and (ends or after.tag == "CC"):  # "keep it separate"
        return "JJ"
    if index == 0 or (before.plain in ("please", "then") and index == 1):
        return "VB" if after.tag in ("DT", "PRP$", "PRP") and not word.ends_clause else ""
    is_s_form = word.plain.endswith("s") and not word.plain.endswith("ss")
    subject = before if before.tag != "RB" else _at(sentence, index - 2)
    is_plural = subject.plain in _PLURALS or subject.mass("NNS", "NNPS") > 0.4
    agrees = is_plural != is_s_form and (is_plural or subject.tag in ("NN", "NNP"))
    others = [each.tag for place, each in enumerate(clause, start) if place != index]
    has_verb = any(tag in _FINITE for tag in others) or sentence[start].tag == "VB"
    is_noun = word.is_name or after.plain in ("of", "we", "they", "he", "she", "i") or word.mass("JJ", "RB") > 0.5
    if agrees and start < index and not has_verb and sentence[-1].ends_sentence and not is_noun:
        return "VBZ" if is_s_form else "VBP"
    return ""


def _kind_of_used(sentence: Sequence[_Word], index: int) -> str:
    """ "It is a tool used to cut" has its verb before, "the tool used to cut it is sharp" behind."""
    if _at(sentence, index - 1).tag not in ("NN", "NNS") or _at(sentence, index + 1).plain != "to":
        return ""
    start, end = _clause_start(sentence, index), _clause_end(sentence, index)
    behind = next((place for place in range(index + 1, end) if sentence[place].tag in (*_FINITE, "CC")), end)
    has_verb = any(each.tag in _FINITE for each in sentence[start:index])
    return "VBN" if has_verb or (behind < end and sentence[behind].tag != "CC") else ""


def _tense(sentence: Sequence[_Word], index: int) -> str:
    """Of "read": what the tagger does not see in "have you read" and "I read it every day"."""
    others = {each.plain for each in sentence}
    before = _at(sentence, index - 1)
    subject = before if before.tag != "RB" else _at(sentence, index - 2)
    if before.tag == "PRP" and _at(sentence, index - 2).plain in ("have", "has", "had"):
        return "VBN"
    is_plain = subject.plain in _PLURALS or subject.tag == "NNS"
    return "VBP" if is_plain and others & _HABIT and not others & _PAST else ""


def _sense(sentence: Sequence[_Word], index: int) -> str:
    """Which of several senses a word has, by the words beside it; "" if its part of speech decides."""
    word, before, after = sentence[index], _at(sentence, index - 1), _at(sentence, index + 1)
    others = {each.plain for each in (*sentence[:index], *sentence[index + 1 :])}
    match word.plain:
        case "lead" if word.is_noun:
            alone = before.plain not in _DETERMINERS and before.tag[:2] in ("IN", "VB", "CC")
            is_metal = after.plain in _LEAD_THINGS or others & _METALS or (alone and after.tag[:2] != "NN")
            return "METAL" if is_metal else "DEFAULT"
        case "bass":
            return "DEFAULT" if others & _FISH else "ADJ"
        case "bow" | "bows" if word.is_noun:
            taken = others & _set("took take takes taking made makes make gave") and before.plain in ("a", "his", "her")
            return "VERB" if others & _SHIP or before.plain in _LOW or taken else "DEFAULT"
        case "row" if word.is_noun:
            goes_on = after.plain in ("over", "about", "erupted", "broke", "flared")
            return "QUARREL" if before.plain in _QUARREL or goes_on else "DEFAULT"
        case "tear" if word.is_noun:
            worn = before.plain == "and" and _at(sentence, index - 2).plain == "wear"
            in_it = after.plain in ("in", "along", "through") and not others & _FACE
            return "VERB" if worn or in_it or before.plain in _RIPPED else "DEFAULT"
        case "minute":
            counted = before.plain in _NUMBERS or before.plain.isdigit()
            is_said = (before.plain in _BE or before.plain in _VERY) and after.tag[:2] not in ("NN", "IN")
            is_small = after.plain in _SMALL or is_said or (after.tag == "NNS" and not word.ends_clause and not counted)
            return "ADJ" if is_small else "DEFAULT"
        case "content":
            is_pleased = before.plain in _BE or before.plain in _VERY
            return "DEFAULT" if is_pleased and after.plain not in ("of", "is", "was") else ""
        case "axes":
            return "DEFAULT" if others & _AXES else "VERB"
        case "polish":
            is_verb = index == 0 and word.mass("VB") > word.mass("JJ", "NN")
            return "NAME" if word.is_name and not is_verb else "DEFAULT"
        case "does":
            return "NOUN" if before.plain in _NUMBERS and word.mass("NN") > 0.5 else "DEFAULT"
        case "deserts" if before.plain == "just":
            return "VERB"
    return ""


def _at(sentence: Sequence[_Word], index: int) -> _Word:
    return sentence[index] if 0 <= index < len(sentence) else _NOTHING


def _clause_start(sentence: Sequence[_Word], index: int) -> int:
    starts = (
        place
        for place in range(index, 0, -1)
        if sentence[place - 1].ends_clause or sentence[place - 1].plain in _CLAUSE_STARTS
    )
    return next(starts, 0)


def _clause_end(sentence: Sequence[_Word], index: int) -> int:
    ends = (
        place + 1
        for place in range(index, len(sentence))
        if sentence[place].ends_clause or _at(sentence, place + 1).plain in _CLAUSE_STARTS
    )
    return next(ends, len(sentence))


def _nearest(heard: str, forms: dict[str, str]) -> list[str]:
    from rapidfuzz.distance import Levenshtein

    distances = {form: Levenshtein.distance(heard, form) for form in forms.values()}
    return [form for form, distance in distances.items() if distance == min(distances.values())]


def _tagged(words: Sequence[str], plain: Sequence[str]) -> list[_Word]:
    """Each word with the Penn tags of the longest of its parts."""
    tokens, owners = [], []
    for owner, word in enumerate(words):
        # With its capital the tagger takes the first word for a name.
        parts = _TOKEN.findall(word[:1].lower() + word[1:] if owner == 0 and word != "I" else word) or [word]
        tokens += parts
        owners += [owner] * len(parts)
    tagger = _tagger()
    found = tagger.tag(_features(tokens))
    longest: dict[int, int] = {}
    for index, owner in enumerate(owners):
        if owner not in longest or len(tokens[index]) > len(tokens[longest[owner]]):
            longest[owner] = index
    result = []
    for owner, word in enumerate(words):
        place = longest[owner]
        masses = {tag: tagger.marginal(tag, place) for tag in _labels()}
        end = word[len(word.rstrip(string.punctuation + "“”‘’…—")) :]
        is_last = owner == len(words) - 1
        result.append(
            _Word(
                plain[owner],
                found[place],
                masses,
                word.strip(string.punctuation + "“”‘’…—")[:1].isupper(),
                is_last or bool(set(end) & set(",.;:!?…—)")),
                is_last and bool(set(end) & set(".!?")),
            )
        )
    return result


def _features(tokens: Sequence[str]) -> list[dict[str, Any]]:
    """What the tagger was trained on (gruut.pos): each word with two before and two behind it."""
    alone = [_features_alone(token) for token in tokens]
    features = []
    for index in range(len(tokens)):
        own: dict[str, Any] = dict(alone[index])
        for offset in (-2, -1, 1, 2):
            if 0 <= index + offset < len(tokens):
                own |= {f"{offset:+d}:{name}": value for name, value in alone[index + offset].items()}
        features.append(
            own | ({"BOS": True} if index == 0 else {}) | ({"EOS": True} if index == len(tokens) - 1 else {})
        )
    return features


def _features_alone(token: str) -> dict[str, Any]:
    ends = {f"word[:{size}]": token[:size] for size in (2, 3)} | {f"word[-{size}:]": token[-size:] for size in (2, 3)}
    return ends | {
        "bias": 1.0,
        "word": base64.b64encode(token.encode()).decode(),
        "len(word)": len(token),
        "word.ispunctuation": token in string.punctuation,
        "word.isdigit()": token.isdigit(),
    }


@cache
def _tagger() -> Any:
    import gruut_lang_en  # late, as all that only Kokoro needs
    import pycrfsuite

    tagger = pycrfsuite.Tagger()
    tagger.open(str(importlib.resources.files(gruut_lang_en) / "pos" / "model.crf"))
    return tagger


@cache
def _labels() -> list[str]:
    return [tag for tag in _tagger().labels() if tag[:2] in _PARENTS]


@cache
def _forms(british: bool) -> dict[str, dict[str, str]]:
    """misaki's words with several forms, by part of speech, not those that are only said with or without stress; and
    those of several senses."""
    table = importlib.resources.files("misaki.data") / f"{'gb' if british else 'us'}_gold.json"
    entries = json.loads(table.read_text(encoding="utf-8"))
    own = {
        "lead": {"DEFAULT": entries["lead"], "METAL": "lˈɛd"},
        "row": {"DEFAULT": entries["row"], "QUARREL": "ɹˈW"},
        "resume": {"DEFAULT": entries["resume"], "NOUN": "ɹˈɛzjuːmˌA" if british else "ɹˈɛzəmˌA"},
        "polish": {"DEFAULT": entries["polish"], "NAME": entries["Polish"]},
        "does": {"DEFAULT": entries["does"], "NOUN": "dˈQz" if british else "dˈOz"},
        "protest": {"DEFAULT": entries["protest"], "VERB": "pɹətˈɛst"},
        "protests": {"DEFAULT": entries["protests"], "VERB": "pɹətˈɛsts"},
        "export": {"DEFAULT": entries["export"], "VERB": "ɪkspˈɔːt" if british else "ɪkspˈɔɹt"},
        "exports": {"DEFAULT": entries["export"] + "s", "VERB": "ɪkspˈɔːts" if british else "ɪkspˈɔɹts"},
    }
    return own | {
        word: forms
        for word, forms in entries.items()
        if isinstance(forms, dict)
        and word not in _NEVER_NOUNS
        and word.islower()
        and set(forms) <= _TAGS
        and len(set(forms.values())) > 1
    }
