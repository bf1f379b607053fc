"""What words say of a contrast agent: in descriptions of series, in the tag that names it, in sidecars of BIDS."""

import re
import unicodedata
from typing import NamedTuple

_AGENT_WORDS = {
    "English": (
        r"gd|gad\w*|ce|contrast\w*|agent|enh\w*|inj(?!ur)\w*|post(?:c\w*|g\w*|km|k|inj\w*)?|pc|dotarem|multihance|magnevist|"
        r"prohance|omniscan|clariscan|elucirem|vueway|optimark|eovist|primovist|feraheme",
        "without|wo|w o|wout|w out|before|prior to|minus|b4|no|not|non|pre",
        r"unenh\w*|plain|non con|no[nt]?(?:con\w*|gd|gad\w*|enh\w*|ce|cm|km)|pre(?:con\w*|gd|gad\w*|inj\w*|km)?",
    ),
    "German": (r"km|kontrast\w*|mitkm|nachkm", "ohne|vor|kein|keine", r"nativ\w*|ohnekm|(?<!\bi )[ov] ?km"),
    "French": (
        r"inj(?!ur)\w*|gado\w*|apres|pdc|contraste",
        "sans|avant|non",
        r"native?s?|ss (?:inj(?!ur)\w*|pdc|produit)",
    ),
    "Spanish": (r"contraste|contrastad\w*|civ|gadolinio", "sin|antes|previo|previa", r"simple|basal"),
    "Portuguese": (r"contraste|pos|apos|gadolinio", "sem|antes|nao", ""),
    "Italian": (r"mdc|contrasto|dopo", "senza|prima", r"basal[ei]|diretta"),
    "Dutch": (r"contrast\w*|gado\w*", "zonder|voor|geen", "blanco"),
    "Polish": (r"kontras[tc]\w*|srodek|srodk\w*", "bez|przed", r"natywn\w*"),
    "Czech": (r"kl|kontrast\w*|postkontrast\w*", "bez|pred", r"nativ\w*"),
    "Nordic": (r"kontrast\w*|tehost\w*|varjoaine\w*|jalkeen", "utan|uden|uten|fore|for|innan|ilman|ennen|ingen", ""),
    "Russian": (
        r"контраст\w*|ку|гад\w*|усил\w*|постконтраст\w*|магневист\w*|омнискан\w*",
        "без|до|не",
        r"натив\w*|бесконтраст\w*|неконтраст\w*|преконтраст\w*",
    ),
    "Turkish": (r"kontrast\w*|ivkm\w*|kontrastli", "", r"(?:kontrast|ivkm|km)siz|ivkm siz|km siz"),
    "Chinese": (
        r"增强\w*|增強\w*|造影\w*|钆\w*|釓\w*|打药\w*|注药\w*|顯影\w*",
        "未|无|無|不|非|没",
        r"平扫\w*|平掃\w*",
    ),
    "Japanese": (r"造影\w*|ガド\w*", "非|無|未", r"単純\w*|プレーン\w*"),
}
"""Language → words for an agent, words that deny one that follows, and words that deny one by themselves; folded."""
_AFTER = r"oncesi|yok|前\w*|なし|無し|无|無"
"""Words that deny an agent that they follow."""
_FILLERS = (
    r"de|del|di|do|da|la|el|il|le|iv|i|v|ev|w|any|the|medio|meio|mezzo|media|medium|produit|mittel|srodka|"
    r"контрастного|contrastmiddel|в|внутривенного"
)


def _column(index: int) -> str:
    return "|".join(dict.fromkeys(words[index] for words in _AGENT_WORDS.values() if words[index]))


_NO_AGENT = re.compile(
    r"\b(?:post?|apres|dopo|nach|apos|pos) ?(?:op(?!t)|fossa|surg|rt\b|rad(?!ial)|xrt|chemo|chimio|tx\b|treat|therap|"
    r"trait|biops|stroke|ictal|trauma|tbi|resec|emboli|clip|shunt|dbs|partum|birth|natal|cirurg|cirug|chir|interv|crani(?:ot|ec|opl)|"
    r"lobe|implant|srs|gamma|gk\b|cyber|ablat|bleed|h(?:a)?emor|seiz|concus|injur|infarct|stent|coil(?:ing|ed)|graft|accident|mva\b|"
    r"covid|vacc|icu\b|ect\b|tms\b|\w+(?:otom|ectom|ostom|plast))\w*\b"
    r"(?! ?(?:plan|nav|stealth|brainlab|protoc))|\bpr(?:e|ae|a) ?op(?!t)\w*|"
    r"\b\d+ ?(?:y|yrs?|years?|mos?|mths?|months?|wks?|weeks?|days?|hrs?|hours?) post\b"
    r"(?! ?(?:gd|gad|con|inj|km|ce\b))"
)
"""Before or after an event that is no injection, so long after one, or behind the rest; folded."""
_OTHER_MEANING = re.compile(
    r"\b(?:magn\w* (?:trans\w* )?|transfer )contrast\w*|"
    r"\b(?:high|higher|low|soft|tissue|matter|grey|gray|white|image|optimi[sz]\w*|improved|maxim\w*) contrast\w*|"
    r"\bcontrast (?:optimi[sz]\w*|resol\w*|ratio|to noise|weight\w*|mechan\w*)|"
    r"\b(?:edges?|image|resol\w*|signal|snr|spatial\w*) enh\w*|\benh\w* (?:edges?|resol\w*|snr|gradient)\b|"
    r"\bbasal (?:gang\w*|cist\w*|nucl\w*|mening\w*|forebrain|skull|temp\w*|front\w*|vein\w*)|"
    r"\b(?:gangli\w*|nucle\w*|cistern\w*) (?:de la |della |du |de )?basal\w*|"
    r"\bpos ?\d{1,2}\b(?! ?(?:ml|cc|m|min\w*)\b)"
)
"""Contrast of tissues, edges, parts of the brain and positions of the table, of which a part would name or deny an
agent; folded."""
_AGENT = re.compile(rf"(?:{_column(0)})\Z")
_DENIED = re.compile(
    rf"\b(?:{_column(1)})(?: (?:{_FILLERS}))* ?(?:{_column(0)})\b(?:(?: (?:{_FILLERS}))* (?:{_column(0)})\b)*|"
    rf"\b(?:{_column(0)}) (?:(?:{_AFTER})(?!\w)|free\Z|none?\Z|no\Z)|"
    rf"(?:造影|增强|增強|注药|打药)剤?(?:{_AFTER})|\b(?:{_column(2)})\b"
)
_AND = "and|or|und|oder|et|ou|y|e|en|i|a|og|och|ja|и"
_OPPOSITES = {
    r"with|w|mit|avec|con|com|met|med|z|s|с": (
        r"without|wo|w o|wout|w out|ohne|sans|sin|sem|senza|zonder|bez|utan|uten|uden|без"
    ),
    r"pre|before|vor|avant|antes|prima|voor|przed|pred|fore|for|innan|ennen|до": (
        r"post|after|nach|apres|despues|depois|apos|dopo|na|po|efter|etter|jalkeen|после"
    ),
}
"""Words that mean both, side by side: of an examination with and without an agent, before and after it."""
_BOTH = re.compile(
    rf"\b(?:wwo|(?:plain|simple|basal[ei]?|nativ\w*|diretta|blanco) (?:{_AND}|plus) (?:{_column(0)})|"
    + "|".join(
        rf"(?:{one}) (?:(?:gd|gad\w*|km|contrast\w*) )?(?:(?:{_AND}) )?(?:{other})"
        for pair in _OPPOSITES.items()
        for one, other in (pair, pair[::-1])
    )
    + rf")\b(?:(?: (?:{_FILLERS}))* (?!post)(?:{_column(0)})\b)*"
)
_ALONE = re.compile(rf"(?:{_column(1)})\Z")
_NEVER_ALONE = frozenset(
    (
        *("minus", "b4", "no", "not", "non", "vor", "voor", "for", "fore", "kein", "keine", "geen", "ingen"),
        *("до", "не", "未", "无", "無", "不", "非", "没"),
    )
)
_OTHER_LACK = re.compile(
    rf"\b(?:{_column(1)}) (?:fs|fat\w*|fett\w*|grasa|graisse|gordura|grasso|sat\w*|supp\w*|mtc?)\b"
)
_WEAK = "contrast|contraste|contrasto|kontrast|enh|enhanced?|pos|pc|agent"
_AMBIGUOUS = re.compile(rf"(?:{_WEAK})\Z")
_GIVEN = re.compile(
    r"\b(?:with|w|mit|avec|con|com|met|med|z|s|post\w*|pos|after|nach|na|apres|apos|dopo|po|efter|etter|iv|i v)"
    rf"(?: (?:{_FILLERS}))* (?:{_WEAK})\b"
)
"""A word that may mean something else names an agent for sure behind one of these."""
_WEAK_DENIAL = r"plain|simple|basal[ei]?|natives?|diretta|blanco"
_AMBIGUOUS_DENIAL = re.compile(rf"\b(?:{_WEAK_DENIAL})\b")
_SANS = re.compile(
    r"(?<![^\W_])(?<![ft]se[ _])(?<!fat[ ._])(?<!\bf[ ._])(?:ss[ ._]+g(?:d|ado[^\W_]*)|s[ _]+gado[^\W_]*)(?![^\W_])"
)
"""French "sans", cut short, unless it may be a single shot or saturation."""
_CJK = re.compile("([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+)")
_FOLDED = str.maketrans({"ı": "i", "ø": "o", "ł": "l", "ß": "ss", "đ": "d", "æ": "ae", "−": "-", "–": "-", "＋": "+"})

_PLACEHOLDER = re.compile(
    r".*(?:remov|anonym|anon\b|de ?-?identif|deid|redact|dummy|confidential|mask|delet|withheld|blank|cleared|"
    r"scrub|pseudonym|unknown|undefined|unspecified|null|unbekannt|inconnu|desconocid|anonimiz|verwijderd|entfernt|"
    r"supprime|eliminad|rimosso|usuniet|see |\bphi\b).*|(?:(\w)\1{2,})|[\W_]*[*?.#x]{2,}[\W_]*|hidden|not avail\w*"
)
"""What de-identifiers and archives write in the place of an agent, or of a name: it says nothing."""
_NONE = re.compile(
    r"(?:no[nt]?\b.*|none.*|nil|nein|kein.*|n|n ?a|0+(?: 0+)?(?: ?ml)?|false|off|"
    r"ningun\w*|nenhum\w*|nao|nessun\w*|aucun\w*|"
    r"geen.*|brak|zadn\w*|ingen.*|inget.*|ei|nie|nej|nei|нет|не .*|yok|hayir|无|無|なし|否|.*unenhanced.*|"
    rf"(?:{_column(1)})(?:(?!\w).*|(?<=[\u3040-\u9fff]).*)|(?:{_column(2)}))?"
)
_AGENT_TAG = re.compile(
    r"gad|\bgd|magnev|mangev|dotarem|dotagraf|clarisc|multih|prohan|omnisc|optimark|eovist|primov|ablavar|vasov|elucir|"
    r"vueway|pixxo|cyclolux|artirem|magnegita|ferum|feraheme|teslas|dtpa|dota\b|bopta|contrast|kontrast|agent|bolus|"
    r"\d ?ml|\d ?cc|mmol|\byes\b|\bja\b|\boui\b|\bsim?\b|\biv\b|\bi v\b|\bkm\b|\bmdc\b|^[1-9][\d ]*$|гадо|магнев|"
    r"омнис|контраст|造影|增|钆|釓|ガド|マグネ|プロハンス|オムニ"
)


def names_agent(text: str) -> bool | None:
    """Whether the text of Contrast/Bolus Agent names one; None of empty text, of a placeholder, of an unknown word."""
    if not text.strip():
        return None
    if not (words := folded(text)):
        return None if re.fullmatch(r"[\W_]*[*?.#]{2,}[\W_]*", text) else False  # "-"
    if is_placeholder(text) or _BOTH.search(words):
        return None
    if _NONE.fullmatch(_DENIED.sub("unenhanced", words)):
        return False
    return True if _AGENT_TAG.search(words) else None


def is_unclear(text: str) -> bool:
    """Whether the text of Contrast/Bolus Agent is neither an agent that is known, nor a denial, nor a placeholder."""
    words = folded(text)
    return bool(words) and names_agent(text) is None and not is_placeholder(text)


def is_placeholder(text: str) -> bool:
    """Whether a text is what de-identifiers write in the place of an agent, a name or an ID."""
    return _PLACEHOLDER.fullmatch(folded(text)) is not None


class Said(NamedTuple):
    """What a description says of a contrast agent; None where it says neither or both."""

    agent: bool | None
    """Whether one was given, by all of its words."""
    surely: bool | None
    """By the words that mean nothing else: these may overrule a tag."""

    def contradicts(self, tag: bool | None) -> bool:
        """Whether words that may mean something else say the opposite of a tag."""
        return tag is not None and self.surely is None and self.agent is (not tag)


def says_agent(description: str) -> bool | None:
    """Whether a description says that a contrast agent was given, or not; None where it says neither or both."""
    return said_of_agent(description).agent


def said_of_agent(description: str) -> Said:
    """What a description says of a contrast agent, and whether that is sure: "contrast" and "basal" may mean others."""
    text = re.sub(r"\bt1(\w*)[\W_]+c[. ]e\b", r"t1\1 ce", plain(description))
    text = re.sub(r"(?:\b(?:gd|gad|km|ce|c) ?)?(?:\+ ?/ ?-|- ?/ ?\+|±)", " w wo ", _SANS.sub(" plain ", text))
    text = re.sub(rf"\b(?:{_WEAK_DENIAL}) ?[+/&] ?(?:{_column(0)})\b", " w wo ", text)
    text = re.sub(r"(?<!\w)c/(?:c\b|contrast)", " gd ", text)
    text = re.sub(r"(?<!\w)s(?:/ ?c\b|[/.] ?(?:contrast\w*|gd\b|gad\w*|km\b|mdc\b|inj\w*))", " unenhanced ", text)
    text = re.sub(r"(?<![\w/])u[./] ?kontrast\w*", " unenhanced ", text)
    text = re.sub(r"\+c\b|\bc\+|\bc ?\(\+\)|\+ ?(?=[ck]ontrast|enh)", " gd ", text)
    text = re.sub(r"\b(?:gd|gad|km|ce|c)(?:-(?![\w-])| ?\(-\))|(?:造影|增强|增強) ?\(?-\)?", " unenhanced ", text)
    text = _OTHER_MEANING.sub(" ", _NO_AGENT.sub(" ", spaced(text)))
    text = re.sub(r"\bt1(ce|gd|c|km|post\w*)\b", "t1 gd", text)
    text = _BOTH.sub(" ", _OTHER_LACK.sub(" ", text))
    text, perhaps_denied = _AMBIGUOUS_DENIAL.subn(" ", text)
    text, denied = _DENIED.subn(" unenhanced ", text)
    words = _GIVEN.sub(" gd ", text).split()
    named = [word for word in words if _AGENT.match(word)]
    sure = any(not _AMBIGUOUS.match(word) for word in named) or len(named) > 1
    if not denied and not named:
        denied = any(_ALONE.match(word) and word not in _NEVER_ALONE for word in words) or "unenhanced" in words
    if (sure and denied) or (named and not sure and (denied or perhaps_denied)):
        return Said(None, None)
    if sure or denied:
        return Said(sure, sure)
    return Said(True if named else False if perhaps_denied else None, None)


def plain(text: str) -> str:
    """Lower case, without accents, peculiar letters and the points of abbreviations."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).lower().translate(_FOLDED))
    text = "".join(letter for letter in text if not unicodedata.combining(letter) or letter in "\u3099\u309a")
    text = re.sub(r"\bm[. ] ?d[. ] ?c\b", "mdc", unicodedata.normalize("NFC", text))
    return re.sub("т(?=[12])", "t", text).replace("w/o", "wo")


def spaced(text: str) -> str:
    """Words of letters and digits, each run of Chinese or Japanese letters a word, with one space between."""
    return re.sub(r"[\W_]+", " ", _CJK.sub(r" \1 ", text)).strip()


def folded(text: str) -> str:
    """Plain and spaced."""
    return spaced(plain(text))
