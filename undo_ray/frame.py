"""Wording that gives away the tutoring frame.

A teacher that explains against a gap has just read a student's answer, its own earlier answer and a score. A
rationale that talks about them ("the student's answer", "previous rationale", "your score") would teach the student
to talk about a conversation it never had, so it is no lesson. The same words in an ordinary sentence ("the student
bought 3 pencils", "each student's answer sheet") are. The patterns ask for the relation, not for the word: somebody's
work, somebody judged, an earlier version, a heading of the prompt. They are measured on recorded answers of models
that never saw the frame (tests/test_frame.py).
"""

from __future__ import annotations

import re
from typing import Final

# Gaps are bounded, so the search is linear in the text.
_S = r"\s{1,3}"
_WORDS = r"(?:[\w-]{1,20}\s{1,3}){0,3}"
_MADE = (
    r"(?:answers?|responses?|attempts?|reasoning|rationale|explanation|approach|misunderstanding|understanding|misconceptions?|"
    r"confusion|mistakes?|errors?|calculations?|submission|thinking|logic|method|conclusion|diagnosis|analysis|feedback)"
)
_OLD = r"(?:previous|prior|earlier|preceding|last|initial|original|first|former)"
_FAULT = (
    r"(?:incorrectly|mistakenly|wrongly|erroneously|correctly|rightly|forg[eo]ts?|misunderst(?:ands?|ood)|misreads?|"
    r"misinterpret(?:s|ed)?|misappl(?:ies|ied)|miscalculate[sd]?|miscount(?:s|ed)?|confus(?:es|ed)|overlook(?:s|ed)|neglect(?:s|ed)|"
    rf"struggle[sd]?|seems?|appears?|should{_S}(?:have|remember|note|notice|check|review|focus)|"
    rf"needs?{_S}to{_S}(?:understand|remember|learn|review|practi[cs]e|see|reali[sz]e)|missed{_S}(?:that|the{_S}(?:step|fact|point|part))|"
    rf"(?:is|was){_S}(?:right|wrong|correct|close|confused|confusing|mistaken|mixing))"
)

_FRAME: Final = re.compile(
    "|".join(
        (
            # Somebody's work. "Each student's answer" is one of many in a word problem.
            rf"(?<!each )(?<!every )(?<!per )\b(?:student|learner|pupil)'s{_S}{_WORDS}{_MADE}\b"
            rf"(?!{_S}(?:sheet|key|paper|book))",
            rf"\b(?:teacher|tutor|instructor)'s{_S}{_WORDS}(?:{_MADE}|solution)\b(?!{_S}(?:sheet|key|paper|book))",
            rf"\b(?:the|this|our){_S}student's{_S}(?:[\w-]{{1,20}}{_S})?(?:solution|work)(?:{_S}above)?(?:,|\.|{_S}(?:is|was|skips?|misses|shows?|fails?|has{_S}an)\b)",
            rf"\b(?:{_MADE}|solution){_S}(?:(?:given|provided|written|produced|made|offered){_S}by|from|of|by){_S}the{_S}(?:student|learner|teacher|tutor)\b",
            rf"\bthe{_S}student{_S}(?:solution|work|score)(?:{_S}above)?{_S}(?:is|was|has|had|shows?|fails?|lacks?|contains?)\b",
            rf"(?<!did )(?<!does )(?<!can )\bthe{_S}(?:student|teacher|tutor){_S}(?:answer|response|attempt|rationale)"
            rf"(?:\s?:|,|{_S}(?:above|is|was|has|had|shows?|gave|gives|fails?|failed|lacks?|misses|missed|uses|used|says|said)\b)",
            rf"\b(?:student|teacher){_S}model\b|\bmodel{_S}student\b",
            rf"\b(?:given|above|shown|provided){_S}(?:student|teacher){_S}(?:answer|response|solution)\b|\btutor's{_S}hints?\b",
            # Somebody judged or helped.
            rf"\b(?:the|this|our|your){_S}(?:student|learner)(?:,{_S}[\w]{{1,20}},)?{_S}(?:has{_S}|had{_S}|may{_S}have{_S}|might{_S}have{_S}|also{_S}|then{_S})?"
            rf"(?:{_FAULT}\b|(?:makes?|made){_S}(?:an?|the|this|one|two|some){_S}{_WORDS}(?:mistake|error)|"
            rf"fail(?:s|ed){_S}to{_S}(?:add|subtract|multiply|divide|account|consider|include|convert|recogni[sz]e|carry|notice|see)\b|"
            rf"(?:did{_S}not|didn't|does{_S}not|doesn't){_S}(?:account|consider|include|convert|recogni[sz]e|understand|show|explain)\b|"
            rf"went{_S}wrong|got{_S}(?:this|it|the{_S}(?:right|wrong|correct|answer))|arrived{_S}at)",
            rf"\bthe{_S}student{_S}(?:got|wrote|answered|obtained|calculated|computed|concluded|said){_S}\$?[0-9][^.\n]{{0,40}}?"
            rf"(?:instead{_S}of|rather{_S}than|which{_S}(?:is|was){_S}(?:not|wrong|incorrect|correct|right)|but{_S}the{_S}(?:correct|right|actual|true))\b",
            rf"\b(?:what|as){_S}the{_S}(?:student|teacher|tutor){_S}(?:missed|forgot|overlooked|said|noted|showed|wrote|explained|pointed|did)\b",
            rf"\b(?:help|helps|guide|guides|teach|teaches|remind|reminds|show|shows|for|lets?){_S}(?:the|this|our){_S}(?:student|learner){_S}"
            rf"(?:to{_S})?(?:learn|understand|see|avoid|improve|reali[sz]e|notice|remember|grasp|follow|fix|correct)\b",
            rf"\b(?:where|how|why|what){_S}(?:the{_S}student|you){_S}(?:went{_S}wrong|(?:got|did){_S}(?:it|this|that)?{_S}?wrong)",
            rf"\byou{_S}(?:have{_S}|had{_S})?made{_S}(?:an?|the|this|one|two|some){_S}{_WORDS}(?:mistake|error)",
            rf"\byou{_S}(?:incorrectly|mistakenly|wrongly|misunderstood|misread|misinterpreted|misapplied|miscalculated|forgot{_S}to)\b",
            rf"\byou{_S}(?:were|are){_S}(?:right|correct|wrong|mistaken)\b|\blast{_S}time,?{_S}(?:you|the{_S}student)\b|\byour{_S}answer{_S}of{_S}\$?[0-9]",
            rf"\bthis{_S}time,?{_S}(?:I|we|let's|let{_S}us)(?:{_S}will)?{_S}(?:explain|spell|go|break|show)\b",
            rf"\byour{_S}{_WORDS}(?:mistake|error|misunderstanding|misconception|reasoning|rationale|score)s?\b",
            rf"\byour{_S}(?:{_OLD}|incorrect|wrong|student){_S}(?:answer|attempt|solution|response|explanation|approach|work)",
            rf"\byour{_S}(?:answer|attempt|solution|approach|response){_S}(?:was|were|is|has){_S}"
            rf"(?:not{_S}|in|partly{_S}|partially{_S}|almost{_S}|mostly{_S})?(?:right|wrong|correct|close)\b",
            rf"\bthe{_S}(?:student|learner)(?:,{_S}\w{{1,20}},)?{_S}(?:(?:has|had|may|might|also|then|often|only|just|\w{{1,12}}ly){_S}){{0,2}}"
            rf"(?:thought|thinks?|believe[sd]?|assume[sd]?|understood|understands|reasoned|forgets?{_S}to|forgot{_S}(?:to|that)|"
            rf"tried{_S}to|attempted|ignore[sd]?|omit(?:s|ted)|misses|reached|stopped|ended|"
            rf"(?:is|was){_S}(?:almost|nearly|partly|partially|mostly|not{_S}quite){_S}(?:right|correct|there)|"
            rf"(?:may|might|does|did|could){_S}not{_S}(?:know|have{_S}known|reali[sz]e|see)|added|subtracted|multiplied|divided|doubled|halved|"
            rf"(?:has|had|have){_S}(?:the|a){_S}(?:right|wrong|correct|good){_S}(?:idea|approach|start|method|answer)|"
            rf"(?:did{_S}not|didn't|does{_S}not|doesn't|failed{_S}to|fails{_S}to|forgot{_S}to|must|should|needs{_S}to){_S}"
            rf"(?:carry|add|subtract|multiply|divide|convert|include|account|consider|recogni[sz]e|reali[sz]e|notice|see|show|"
            rf"explain|understand|check|round|simplify|count|use|read|apply|remember|take{_S}into))\b",
            rf"\bstudents?{_S}who{_S}(?:struggles?|confuses?|forgets?|misunderstands?|has{_S}trouble|have{_S}trouble)\b",
            rf"(?<!if )(?<!when )(?<!that )\byou{_S}(?:also{_S}|then{_S}|just{_S}|only{_S}|\w{{1,12}}ly{_S})?"
            r"(?:added|subtracted|multiplied|divided|doubled|halved|forgot|skipped|missed|stopped|ignored|mixed|scored|confused|"
            r"overlooked|correctly|rightly|successfully)\b",
            rf"\b(?:noticed?|see|saw|found|looks{_S}like){_S}(?:that{_S})?you{_S}(?:added|subtracted|multiplied|divided|used|wrote|got)\b",
            rf"^(?:correct|incorrect|wrong|not{_S}quite|almost)[!.,]{_S}you\b",
            rf"\byour{_S}(?:solution|explanation|method|approach){_S}(?:is|was|stops?|gives?|gave|ends?|has|contains?|shows?|misses|uses|used)\b",
            rf"\byour{_S}attempts?\b|\byour{_S}work{_S}(?:was|is|shows|above)\b",
            rf"\b(?:good|great|nice){_S}(?:job|try|start|attempt){_S}?(?:[,!]|on\b|with\b)",
            # An earlier version.
            rf"\b{_OLD}{_S}(?:teacher{_S}|tutor{_S}|student{_S}|incorrect{_S}|wrong{_S})?rationales?\b",
            rf"\b(?:previous|prior|earlier|preceding){_S}(?:teacher|tutor|student|incorrect|wrong){_S}(?:{_MADE}|solution)\b",
            rf"\b(?:unlike|as|than)(?:{_S}in)?{_S}the{_S}{_OLD}{_S}(?:iteration|round)\b",
            rf"\b(?:the|my|our|an?|this|these){_S}(?:previous|prior|earlier){_S}(?:explanation|attempt|response|teaching)s?\b",
            rf"\bmy{_S}{_OLD}{_S}(?:answer|solution|explanation|analysis)",
            rf"\b(?:unlike|in|improv\w{{1,6}}{_S}(?:on|upon)|compared{_S}(?:to|with)|build\w{{0,3}}{_S}(?:on|upon)|correct\w{{0,3}}|revis\w{{1,4}}|fix\w{{0,3}}|"
            rf"expand\w{{0,3}}{_S}on|mistakes?{_S}of|errors?{_S}of){_S}(?:the|an?){_S}(?:previous|prior|earlier){_S}(?:answer|solution|reasoning)",
            rf"\bthe{_S}(?:previous|prior|earlier){_S}(?:answer|solution|reasoning){_S}"
            rf"(?:was{_S}(?:in)?correct|was{_S}wrong|made|contained|missed|skipped|failed|did{_S}not|didn't|incorrectly|overlooked|forgot|confused)\b",
            rf"\brepeat\w{{0,3}}{_S}(?:the|that){_S}(?:same|earlier|previous){_S}(?:mistake|error)",
            rf"\b(?:new|revised|improved|updated|rewritten|regenerated){_S}(?:answer|rationale|explanation)\b(?!{_S}(?:sheet|key|paper|book))",
            rf"\bin{_S}this{_S}iteration\b|\bunlike{_S}before\b|\banswered{_S}(?:in)?correctly{_S}(?:before|earlier|last)\b",
            rf"\b(?:iteration|round){_S}[0-9]{{1,3}}{_S}(?:teacher|tutor|student|answer|rationale|explanation)\b",
            rf"\b(?:your|our){_S}(?:previous|prior|earlier){_S}(?:answer|solution|work|reasoning)\b|\bbetter{_S}than{_S}before\b",
            rf"\b(?:last|previous){_S}(?:round|iteration)'s\b|\b(?:mistakes?|errors?){_S}from{_S}(?:before|earlier|last)\b",
            rf"\bthis{_S}(?:student|learner)\b|\bthe{_S}attempted{_S}answer\b|\bwas{_S}scored{_S}(?:0|zero)\b",
            rf"\bthe{_S}feedback{_S}(?:says|asks|suggests|shows|notes|points)\b|\bas{_S}a{_S}(?:\w{{1,20}}{_S})?tutor,",
            # The prompt itself.
            rf"\bas{_S}(?:the|your){_S}(?:AI{_S})?tutor\b|\bas{_S}your{_S}teacher\b|\bas{_S}(?:an?|the|your){_S}{_WORDS}(?:tutor|teacher|instructor),?{_S}(?:I|my|we|let)\b",
            rf"\bas{_S}an{_S}AI\b|\byour{_S}tutor\b|\b(?:my|the){_S}task{_S}as{_S}an?{_S}{_WORDS}(?:tutor|teacher)",
            r"\bgap[ _](?:information|block)\b|\bnew_answer\b",
            rf"\bgaps?{_S}(?:identified|noted|described|in{_S}(?:the|your|understanding))\b",
            rf"\b(?:looking{_S}at|judging{_S}by|considering){_S}(?:the|your|this|that){_S}score\b",
            rf"\b(?:scored|shown|validation){_S}examples?\b",
            rf"\b(?:received|earned|got|given|gets|has|with){_S}a{_S}score{_S}of{_S}(?:0|1|zero|one)\b(?![.,:/-]?[0-9])",
            rf"\bthe{_S}score{_S}(?:is|was){_S}(?:0|zero)(?=[,.;]{_S})",
            rf"\bscore{_S}of{_S}(?:0|zero){_S}(?:was|is|because|for|on|means|shows|here)\b",
            rf"\bscored?{_S}(?:0|zero){_S}(?:on|for|in|because|since){_S}(?:this|the|that){_S}(?:question|problem|attempt|answer|example)",
            rf"\b(?:low|zero|given|student){_S}score{_S}(?:shows?|indicates?|reflects?|suggests?|means?)\b",
            rf"\b(?:based{_S}on|according{_S}to|incorporating|considering|given|per){_S}(?:the|this|your|that){_S}feedback\b",
            rf"\b(?:as|noted|identified|described|outlined|found|seen|mentioned){_S}in{_S}(?:the|my){_S}(?:analysis|diagnosis)\b",
            r"^[ \t>*]{0,8}#{1,6}[ \t*]{0,4}(?:iteration[ _][0-9]{1,3}[ _])?"
            r"(?:student|teacher|tutor|score|diagnosis|new[ _]answer)\b",
            r"^[ \t>#*-]{0,8}(?:student|teacher|tutor)(?:'s)?[ _]"
            r"(?:answer|response|attempt|solution|mistake|error|score|feedback)[ *]{0,3}:",
            r"^[ \t>#*-]{0,8}score[ *]{0,3}:[ *]{0,3}[01][ *]{0,3}$",
        )
    ),
    re.IGNORECASE | re.MULTILINE,
)


_SENTENCE: Final = re.compile(r"[^.!?\n]++")
_PARTY: Final = re.compile(rf"\b(?:the|this|our){_S}(student|learner|teacher|tutor)\b(?!s)", re.IGNORECASE)
_JUDGED: Final = re.compile(
    r"\b(?:wrong(?:ly)?|incorrect(?:ly)?|mistake[ns]?|mistakenly|errors?|misunderst\w{1,10}|misconceptions?|confus\w{1,5}|"
    r"explanations?|rationales?|attempts?|reasoning|analysis|feedback|gap)\b",
    re.IGNORECASE,
)
_REPLIED: Final = re.compile(r"\b(?:answer(?:s|ed)?|(?:dis)?agree[sd]?)\b", re.IGNORECASE)
_EXAM: Final = re.compile(r"\b(?:questions|problems|quiz(?:zes)?|tests?|exams?|points|items)\b", re.IGNORECASE)
"""In a story about an exam, pupils answer rightly and wrongly as well."""


def frame_phrase(text: str, question: str | None = None) -> str | None:
    """The first wording in `text` that refers to the tutoring frame, or None. Pure, linear in the length of `text`.

    With the `question`, "the student" (learner, teacher, tutor) is also one when the question speaks of none: whom else
    could the text mean?
    """
    text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    if found := _FRAME.search(text):
        return found.group().strip()
    if question is not None:
        asked = question.lower()
        for party in _PARTY.finditer(text):
            if party[1].lower() not in asked:
                return party.group()
    for sentence in _SENTENCE.findall(text):
        parties = {party.lower() for party in _PARTY.findall(sentence)}
        judged = _JUDGED.search(sentence) or (len(parties) > 1 and _REPLIED.search(sentence))
        if parties and judged and not _EXAM.search(sentence):
            return str(sentence.strip()[:100])
    return None
