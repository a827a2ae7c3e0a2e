"""English Wikipedia sentences from the dump excerpt that gensim carries in its test data.

gensim's own reader walks the dump and takes most of the markup out; here what is left is turned into sentences.
Everything not kept is counted under the reason for which it was dropped.
"""

from __future__ import annotations

import bz2
import re
from collections import Counter
from collections.abc import Iterator

DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
MIN_WORDS, MAX_WORDS = 5, 64

# A full stop after one of these, or after initials, ends no sentence.
ABBREVIATION = re.compile(
    r"mr|mrs|ms|dr|st|prof|gen|col|capt|lt|sgt|rev|hon|gov|sen|rep|pres|jr|sr|inc|ltd|co|corp|vs|etc|al|cf|ca|no|vol|"
    r"pp|fig|ed|eds|eg|ie|approx|mt|ft|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|(\w\.)*[a-z]",
    re.IGNORECASE,
)
BOUNDARY = re.compile(r"""(?<=[.!?])["'”’)\]]*\s+(?=["'“‘(\[]?[A-Z0-9])""")
LAST_WORD = re.compile(r"([\w.]+)\.$")

# Line starts that are no running prose: headings, lists, indents, table cells, template and link remains.
NOT_PROSE = tuple("=*#:;|!{}<[-–—&")
MARKUP = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|[<>|=]|https?://|&\w+;|__\w+__|\bthumb\b|\bwikt?:")
QUOTES = re.compile(r"'{2,}")  # ''italic'' and '''bold'''
# Templates (pronunciations, conversions, dates) leave holes: "(, )", "(; born 1950)", "the Greek , that is".
EMPTY_PARENS = re.compile(r"\s*\([\s,;:.–-]*\)")
PAREN_START = re.compile(r"\(\s*[,;:]\s*")
SPACE_BEFORE = re.compile(r"\s+([,;:.!?)])")
DOUBLED = re.compile(r"([,;:])(?:\s*[,;:])+")


def split_sentences(paragraph: str) -> Iterator[str]:
    """Cut a paragraph at . ! ? before a capital or a digit, but not after an abbreviation or an initial."""
    start = 0
    for boundary in BOUNDARY.finditer(paragraph):
        sentence = paragraph[start : boundary.start()]
        last = None if boundary[0].strip() else LAST_WORD.search(sentence)  # a closing quote ends it for certain
        if last and ABBREVIATION.fullmatch(last[1]):
            continue
        # Closing quotes and brackets stand in the boundary, and belong to the sentence that they close.
        yield (sentence + boundary[0].rstrip()).strip()
        start = boundary.end()
    if rest := paragraph[start:].strip():
        yield rest


def tidy(line: str) -> str:
    """Take out bold and italic marks and close the holes that removed templates left."""
    line = QUOTES.sub("", line.replace("\xa0", " "))
    line = PAREN_START.sub("(", EMPTY_PARENS.sub("", line))
    return DOUBLED.sub(r"\1", SPACE_BEFORE.sub(r"\1", " ".join(line.split())))


def fault(sentence: str) -> str | None:
    """The reason for which a sentence is not used, or None."""
    words = len(sentence.split())
    if MARKUP.search(sentence):
        return "markup left in the sentence"
    first, last = sentence[0], sentence[-1]
    if not (first.isupper() or first.isdigit() or first in "\"“‘'(") or last not in ".!?\"”’')":
        return "not a whole sentence"
    if words < MIN_WORDS:
        return f"shorter than {MIN_WORDS} words"
    if words > MAX_WORDS:
        return f"longer than {MAX_WORDS} words"
    return None


def article_sentences(text: str, dropped: Counter) -> Iterator[str]:
    """Sentences of one article already freed of its markup; adds to `dropped` what is left out and why."""
    for line in text.split("\n"):
        if not line.strip():
            continue
        if line[0].isspace() or line.startswith(NOT_PROSE):
            dropped["headings, list items, table cells"] += 1
            continue
        for sentence in split_sentences(tidy(line)):
            if reason := fault(sentence):
                dropped[reason] += 1
            else:
                yield sentence


def wikipedia_sentences() -> tuple[list[str], Counter]:
    """All usable sentences of the excerpt in their order, each once, and the counts of what was dropped."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    from gensim.test.utils import datapath

    dropped: Counter = Counter()
    sentences: dict[str, None] = {}  # keeps order and drops duplicates
    with bz2.open(datapath(DUMP)) as dump:
        for _, markup, _ in extract_pages(dump, filter_namespaces=("0",)):
            if markup.lstrip().lower().startswith("#redirect"):
                dropped["redirect pages"] += 1
                continue
            for sentence in article_sentences(filter_wiki(markup), dropped):
                if sentence in sentences:
                    dropped["duplicates"] += 1
                sentences[sentence] = None
    return list(sentences), dropped
