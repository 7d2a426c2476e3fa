"""Wording that gives away the tutoring frame, or a hint.

A teacher that explains against a gap has just read a student's answer, its own earlier answer and a score. A rationale that
talks about them would teach the student to talk about a conversation it never had, so it is no lesson. The same words in a
word problem about students are. The question tells the two apart: "the student" in a text whose question speaks of none can
only mean ours. A teacher that was shown the right answer or a solution may speak of that in the same way. Measured on recorded
answers of models that saw neither (tests/test_frame.py).
"""

from __future__ import annotations

import re
from typing import Final

_OLD = r"(?:previous|prior|earlier|preceding|initial|original|former)"
_WORK = (
    r"(?:answer|response|attempt|rationale|explanation|reasoning|solution|approach|analysis|diagnosis|feedback|"
    r"mistake|error|misunderstanding|misconception|confusion|score)s?"
)

# Gaps are bounded and alternatives do not overlap, so a search is linear in the text.
_FRAME: Final = re.compile(
    "|".join(
        (
            # An earlier version of the text, or somebody's.
            rf"\b(?:the|my|our|your|an?|this)\s(?:{_OLD}|last)\s(?:\w{{1,20}}\s)?(?:rationale|explanation|attempt|response|teaching)s?\b",
            rf"\b(?:my|our|your)\s(?:{_OLD}|last)\s(?:\w{{1,20}}\s)?{_WORK}\b",
            rf"\b(?:unlike|compared\s(?:to|with)|improv\w{{1,6}}\son|(?:mistake|error)s?\s(?:of|from))\s(?:the\s)?(?:{_OLD}|last|before)\b",
            r"\b(?:this|last)\stime,?\s(?:I|we|you|let's)\b|\bincorrectly\sbefore\b",
            rf"\bthe\s{_OLD}\s(?:answer|solution|reasoning)\s(?:was|made|missed|skipped|failed|contained|did|incorrectly)\b",
            rf"\b{_OLD}\s(?:\w{{1,20}}\s)?rationales?\b|\brepeat\w{{0,3}}\s(?:the|that)\s(?:same|{_OLD})\s(?:mistake|error)",
            r"\b(?:new|revised|improved|updated|rewritten)\s(?:answer|rationale|explanation)\b(?!\s(?:sheet|key|paper|book))",
            r"\bin\sthis\siteration\b|\bprevious\siteration\b|\b(?:iteration|round)\s[0-9]{1,3}\s(?:teacher|student|answer|rationale)\b",
            # The reader addressed as the one who erred.
            r"\byour\s(?:\w{1,20}\s)?(?:mistake|error|reasoning|rationale|score|misunderstanding|misconception|confusion|attempt)s?\b",
            r"\byour\s(?:answer|solution|explanation|method|approach|response|work)\s(?:is|was|were|has|had|of|stops?|gave|misses|shows?)\b",
            r"\byour\s(?:incorrect|wrong|student)\s\w|\b(?:notice[ds]?|see|saw)\sthat\syou\b|^(?:in)?correct!\s",
            r"\byou\s(?:\w{1,12}ly\s|also\s|then\s|just\s|had\s|have\s)?(?:made\s(?:an?|the|this|one)\s(?:\w{1,20}\s)?(?:mistake|error)|forgot|"
            r"missed|misread|misunderstood|overlooked|confused|skipped|mixed\sup|scored|(?:were|are)\s(?:right|correct|wrong|close)|"
            r"incorrectly|mistakenly|wrongly|correctly|went\swrong|got\s(?:it|this)\s(?:right|wrong))\b",
            r"\bwhere\s(?:you|the\sstudent)\swent\swrong\b|\b(?:good|great|nice)\s(?:job|try|start|attempt)\b",
            # The tutor, the score, the prompt.
            r"\bas\s(?:an?\s(?:AI|(?:\w{1,20}\s)?tutor)|(?:the|your)\s(?:AI\s)?(?:tutor|teacher))\b|\byour\stutor\b",
            r"\bscored?\s(?:of\s)?(?:0|zero)\b(?![.,:/-]?[0-9])|\ba\sscore\sof\s[01]\b(?![.,:/-]?[0-9])|\b(?:low|this|given|at\sthe|by\sthe)\sscore\b",
            r"\bgap[ _](?:information|block)\b|\bnew_answer\b|\b(?:scored|validation)\sexamples?\b",
            r"\bgaps?\s(?:identified|noted|described)\b",
            r"\b(?:on|to|per)\s(?:the|this|your)\sfeedback\b",
            r"\bthe\sfeedback\s(?:says|asks|suggests|shows|notes|points)\b|\bin\sthe\s(?:analysis|diagnosis)\b",
            r"^[ \t>#*-]{0,8}(?:iteration[ _][0-9]{1,3}[ _])?(?:student|teacher|tutor|learner)(?:'s)?[ _]"
            r"(?:answer|response|attempt|score)",
            r"^[ \t>#*-]{0,8}score[ *]{0,3}:?(?:\s)?[ *]{0,3}[01][ *]{0,3}$",
        )
    ).replace(r"\s", r"\s{1,3}"),
    re.IGNORECASE | re.MULTILINE,
)
_PARTY: Final = re.compile(
    r"\b(?:the|this|our|a)\s{1,3}(?:\w{1,20}\s{1,3})?(student|learner|pupil|teacher|tutor)(?:'s)?\b|\b(student|teacher|tutor)'s\b",
    re.IGNORECASE,
)

_HINT: Final = re.compile(
    "|".join(
        (
            r"\bhint(?:s|ed)?\b",
            r"\b(?:given|provided|supplied|reference|expected|official|gold|target|intended|stated)\s(?:\w{1,20}\s)?"
            r"(?:answer|solution)s?\b(?!\s(?:choice|option))",
            r"\bknown\s(?:\w{1,20}\s)?answer\b|\banswer\skey\b|\bfor\s(?:me|you|us)\salone\b",
            # "The answer given", but "the solution is given by x = 2".
            r"\b(?:answer|solution)\s(?:(?:is|was|has\sbeen|that\s(?:is|was)|which\s(?:is|was)|(?:I|we)\s(?:was|were|are))\s)?"
            r"(?:already\s)?(?:given|provided|supplied|known)\b(?!\s(?:by|as|in\sterms))|\banswer,?\s(?:was|as)\sgiven\b(?!\sby)",
            r"\bas\s(?:was\s)?(?:provided|supplied)\b(?!\s(?:in|by)\s(?:the|this)\s(?:\w{1,20}\s)?(?:question|problem|statement|"
            r"text|passage|table|figure|diagram))",
            r"\b(?:according\sto|based\son|per)\sthe\s(?:\w{1,20}\s)?(?:answer|solution)\b(?!\s(?:choice|option))",
            r"\b(?:since|because|given|knowing|told|know)\s(?:that\s)?the\s(?:right\s|correct\s|final\s)?answer\s(?:is|was)\b",
            r"\b(?:match(?:es|ing)?|agree(?:s|ing)?\swith|consistent\swith)\sthe\s(?:right\s|correct\s|final\s)?(?:answer|solution|reference)\b"
            r"(?!\s(?:choice|option))",
            r"\b(?:was|were|been|am|are)\s(?:given|told|shown|provided\swith)\s(?:that\s)?the\s(?:\w{1,20}\s)?(?:answer|solution)\b",
        )
    ).replace(r"\s", r"\s{1,3}"),
    re.IGNORECASE,
)


def frame_phrase(text: str, question: str) -> str | None:
    """The first wording in `text`, an answer to `question`, that refers to the tutoring frame; None when there is none.

    Pure, linear in the length of `text`.
    """
    text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    if found := _FRAME.search(text):
        return found.group().strip()
    asked = question.lower()
    for party in _PARTY.finditer(text):
        if (party[1] or party[2]).lower() not in asked:
            return party.group()
    return None


def hint_phrase(text: str, question: str) -> str | None:
    """The first wording in `text`, an answer to `question`, that refers to a given answer or solution; None when there is none.

    What the question says too ("Hint: use the sine rule") is ordinary. Pure, linear in the length of `text`.
    """
    asked = question.lower()
    found = (phrase.group() for phrase in _HINT.finditer(text))
    return next((phrase for phrase in found if phrase.lower() not in asked), None)
