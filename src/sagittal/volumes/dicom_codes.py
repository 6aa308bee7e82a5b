"""What a label means in codes that other systems know: SNOMED CT where the table has it, else a private one.

The table holds only codes of the DICOM standard's context groups (CID 4031, 7140, 7151, 7159, 7166, 7192, 7194, 7197),
with the meanings that stand there; `Code` is as in PS3.3, section 8.8. The names beside them are those that public data
sets use. What is not in the table, and was not declared, keeps its name under a private scheme: a wrong code is worse
than none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sagittal.errors import DataError

SNOMED, PRIVATE = "SCT", "99SAGITTAL"
MAX_VALUE, MAX_SCHEME, MAX_MEANING = 16, 16, 64
"""Characters that DICOM allows."""


@dataclass(frozen=True)
class Code:
    """A coded concept.

    Attributes:
        value: 10200004
        scheme: SCT, DCM, NCIt; what starts with 99 is private.
        meaning: Liver
    """

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class Concept:
    """What a segment is.

    Attributes:
        category: anatomical structure, tissue, body substance or morphologically abnormal structure.
        kind: what it is: Kidney, Neoplasm.
        side: right or left, of the kind, or of the place where there is one.
        place: the organ that an abnormality lies in.
    """

    category: Code
    kind: Code
    side: Code | None = None
    place: Code | None = None


ANATOMY = Code("91723000", SNOMED, "Anatomical Structure")
TISSUE = Code("85756007", SNOMED, "Tissue")
SUBSTANCE = Code("91720002", SNOMED, "Body Substance")
ABNORMAL = Code("49755003", SNOMED, "Morphologically Abnormal Structure")
RIGHT = Code("24028007", SNOMED, "Right")
LEFT = Code("7771000", SNOMED, "Left")
_SIDES = {"right": RIGHT, "r": RIGHT, "rt": RIGHT, "left": LEFT, "l": LEFT, "lt": LEFT}

_VERTEBRAE = """
    C1 14806007, C2 39976000, C3 113205007, C4 5329002, C5 36978003, C6 36054005,
    C7 87391001, T1 64864005, T2 53733008, T3 1626008, T4 73071006, T5 56401006,
    T6 45296009, T7 62487009, T8 11068009, T9 82687006, T10 7610001, T11 12989004,
    T12 23215003, L1 66794005, L2 14293000, L3 36470004, L4 11994002, L5 49668003
"""

_ANATOMY = """
    10200004 Liver: hepar
    78961009 Spleen: lien
    64033007 Kidney: kidneys, kidney parenchyma
    15776009 Pancreas:
    28231008 Gallbladder: gall bladder
    69695003 Stomach:
    32849002 Esophagus: oesophagus
    38848004 Duodenum:
    30315005 Small intestine: small bowel, intestine small
    14742008 Large intestine: large bowel
    71854001 Colon:
    60184004 Sigmoid colon:
    34402009 Rectum:
    89837001 Bladder: urinary bladder
    87953007 Ureter:
    41216001 Prostate: prostate gland
    279706003 Peripheral zone of the prostate: prostate peripheral zone, peripheral zone, pz
    399384005 Transition zone of the prostate: prostate transition zone, transition zone, tz
    64739004 Seminal Vesicle: seminal vesicles
    40689003 Testis: testicle
    35039007 Uterus:
    15497006 Ovary:
    23451007 Adrenal gland: adrenal, adrenals
    39607008 Lung: lungs
    45653009 Upper lobe of lung: lung upper lobe, upper lobe
    72481006 Middle lobe of right lung: lung middle lobe right, right lung middle lobe, lung middle lobe
    90572001 Lower lobe of lung: lung lower lobe, lower lobe
    44567001 Trachea:
    955009 Bronchus: bronchi
    69748006 Thyroid: thyroid gland
    9875009 Thymus gland: thymus
    76752008 Breast:
    80891009 Heart:
    76848001 Pericardium:
    87878005 Left ventricle: heart ventricle left, left heart ventricle, left ventricular cavity
    53085002 Right ventricle: heart ventricle right, right heart ventricle, right ventricular cavity
    82471001 Left atrium: heart atrium left, left heart atrium
    73829009 Right atrium: heart atrium right, right heart atrium
    49848007 Left ventricle myocardium: left ventricular myocardium, lv myocardium, myocardium of the left ventricle
    33626005 Left auricular appendage: left atrial appendage, atrial appendage left, laa
    15825003 Aorta: arota
    54247002 Ascending aorta: aorta ascending
    32672002 Descending aorta: aorta descending
    7832008 Abdominal aorta:
    81040000 Pulmonary artery:
    122972007 Pulmonary vein: pulmonary veins
    64131007 Inferior vena cava: ivc, postcava
    48345005 Superior vena cava: svc
    32764006 Portal vein:
    35819009 Splenic vein:
    8993003 Hepatic vein: hepatic veins
    76015000 Hepatic artery:
    2841007 Renal artery: renal arteries
    56400007 Renal vein: renal veins
    42258001 Superior mesenteric artery: sma
    57850000 Truncus coeliacus: celiac trunk, coeliac trunk
    10293006 Iliac artery: iliac arteries
    73634005 Common iliac artery:
    244411005 Iliac vein: iliac vena, iliac veins
    46027005 Common iliac vein:
    12691009 Brachiocephalic trunk:
    8887007 Brachiocephalic vein:
    36765005 Subclavian artery:
    32062004 Common carotid artery:
    69105007 Carotid Artery: carotid
    41801008 Coronary artery: coronary arteries
    12738006 Brain:
    119238007 Brain Stem: brainstem
    113305005 Cerebellum:
    40146001 Cerebral cortex:
    68523003 Cerebral White Matter:
    88442005 Corpus callosum:
    5366008 Hippocampus:
    4958002 Amygdala:
    119406000 Thalamus: thalamus proper
    11000004 Caudate Nucleus: caudate
    89278009 Putamen:
    14738005 Globus Pallidus: pallidum
    427667007 Nucleus Accumbens: accumbens, accumbens area
    66720007 Lateral Ventricle: brain lateral ventricle
    49841001 Third ventricle: 3rd ventricle
    35918002 Fourth Ventricle: 4th ventricle
    56329008 Pituitary: pituitary gland
    2748008 Spinal cord: spinalcord
    81745001 Eye: eyeball
    78076003 Lens: eye lens
    18234004 Optic nerve: opticnerve
    244453006 Optic chiasm: chiasm, opticchiasm
    13561001 Lacrimal gland:
    45289007 Parotid gland: parotid
    54019009 Submandibular gland: submandibular
    74262004 Oral cavity:
    21974007 Tongue:
    4596009 Larynx:
    54066008 Pharynx:
    89546000 Skull:
    91609006 Mandible:
    70925003 Maxilla:
    38199008 Tooth: teeth
    56873002 Sternum:
    51299004 Clavicle: clavicula
    79601000 Scapula:
    85050009 Humerus:
    23416004 Ulna:
    71341001 Femur: femurs
    2812003 Head of Femur: femur head, femoral head
    12611008 Tibia:
    87342007 Fibula:
    64234005 Patella:
    54735007 Sacrum:
    64688005 Coccyx:
    113197003 Rib: ribs
    51282000 Vertebra: vertebrae
    50016007 Costal Cartilage: costal cartilages
    74135004 Meniscus:
    59441001 Lymph Node: lymph nodes
"""
_TISSUES = """
    59820001 Blood Vessel: blood vessels, vessel, vessels
    51114001 Artery: arteries
    29092000 Vein: veins
    3138006 Bone: bones
    309312004 Cartilage:
    91727004 Muscle: muscles
    55603005 Fat: adipose tissue
    39937001 Skin:
    389080008 White Matter: wm
    389081007 Gray Matter: grey matter, gm
"""
_SUBSTANCES = """
    65216001 Cerebrospinal Fluid: csf
    39477002 Feces: faeces, stool
    78014005 Urine:
    74947009 Gas: bowel gas
"""
_ABNORMAL = """
    108369006 Neoplasm: tumor, tumour, tumors, tumours, cancer, tumor core, tumour core, gtv
    14799000 Neoplasm, Secondary: metastasis, metastases, metastatic tumor, metastatic tumour
    52988006 Lesion: lesions, whole tumor, whole tumour
    4147007 Mass:
    27925004 Nodule: nodules
    367643001 Cyst: cysts
    79654002 Edema: oedema, peritumoral edema, peritumoural oedema
    6574001 Necrosis: necrotic core, necrotic tumor core, necrotic tumour core
    50960005 Hemorrhage: haemorrhage
    35566002 Hematoma: haematoma
    44132006 Abscess: abscesses
    396339007 Thrombus: thrombi
    55584005 Embolus: emboli
    60046008 Pleural effusion:
    NCIt:C113842 Enhancing Lesion: enhancing tumor, enhancing tumour
    NCIt:C81175 Non-Enhancing Lesion: non enhancing tumor, non enhancing tumour, nonenhancing tumor
    DCM:110702 White Matter T2 Hyperintensity: white matter hyperintensity, white matter hyperintensities, wmh
"""
_ORGAN_WORDS = {
    "hepatic": "liver",
    "renal": "kidney",
    "pulmonary": "lung",
    "pancreatic": "pancreas",
    "splenic": "spleen",
}
_PLACED = (
    "neoplasm",
    "lesion",
    "mass",
    "nodule",
    "cyst",
    "metastasis",
    "abscess",
    "hemorrhage",
    "edema",
    "blood vessel",
)
"""Kinds whose name may follow that of the organ they lie in: liver tumor, hepatic vessels."""
_ABNORMAL_WORDS = re.compile(
    r"tumou?r|neoplasm|cancer|carcinoma|lesion|metasta|cyst|nodule|mass\b|o?edema|necro|ha?emorrhag|ha?ematoma|infarct|"
    r"stroke|aneurysm|effusion|thromb|embol|abscess|polyp|stone|fracture|plaque|glioma|adenoma|hyperintens|opacit",
    re.IGNORECASE,
)


def _parsed(rows: str, category: Code) -> dict[str, Concept]:
    """Return the concepts of a table by each of their names."""
    found: dict[str, Concept] = {}
    for row in filter(None, (line.strip() for line in rows.splitlines())):
        head, _, names = row.rpartition(":")
        number, _, meaning = head.partition(" ")
        scheme, _, value = number.rpartition(":")
        concept = Concept(category, Code(value, scheme or SNOMED, meaning))
        for name in (meaning, *names.split(",")):
            if name.strip():
                found[_plain(name)] = concept
    return found


def _plain(name: str) -> str:
    """Return a name in small letters, words with one space between."""
    return " ".join(re.findall(r"[^\W_]+", name.lower()))


def _vertebrae() -> dict[str, Concept]:
    found = {}
    for name, value in (pair.split() for pair in _VERTEBRAE.split(",")):
        concept = Concept(ANATOMY, Code(value, SNOMED, f"{name} vertebra"))
        for text in (f"{name} vertebra", f"vertebra {name}", f"vertebrae {name}"):
            found[_plain(text)] = concept
    return found


_TABLE: Mapping[str, Concept] = {
    **_parsed(_ANATOMY, ANATOMY),
    **_vertebrae(),
    **_parsed(_TISSUES, TISSUE),
    **_parsed(_SUBSTANCES, SUBSTANCE),
    **_parsed(_ABNORMAL, ABNORMAL),
}
KNOWN_CODES: tuple[Code, ...] = tuple(
    dict.fromkeys((ANATOMY, TISSUE, SUBSTANCE, ABNORMAL, RIGHT, LEFT, *(each.kind for each in _TABLE.values())))
)
"""Every public code that can be written without one being declared."""


def code_of(name: str, codes: Mapping[str, str] | None = None) -> Concept:
    """Return what a label means.

    Args:
        name: of the label.
        codes: those that dataset.json declares, `SCT:10200004:Liver` by the name of the label.

    Raises:
        DataError: a declared code can't be read; see `parse_code`.
    """
    declared = (codes or {}).get(name)
    known = _known(name)
    if declared is None:
        return known or Concept(_category_of(name), private_code(name))
    kind = parse_code(declared, name)
    if known is not None and _is_same(known.kind, kind):
        return replace(known, kind=kind)
    same = next((each for each in _TABLE.values() if _is_same(each.kind, kind)), None)
    return Concept(_category_of(name) if same is None else same.category, kind)


def parse_code(text: str, name: str) -> Code:
    """Return the code in `SCHEME:VALUE:MEANING`.

    Args:
        text: as dataset.json declares it.
        name: of its label, for the message.

    Raises:
        DataError: a part is missing or longer than DICOM allows.
    """
    scheme, _, rest = text.partition(":")
    value, _, meaning = rest.partition(":")
    lengths = ((scheme, MAX_SCHEME), (value, MAX_VALUE), (meaning, MAX_MEANING))
    if not all(0 < len(part.strip()) <= most for part, most in lengths) or "\\" in text or not text.isprintable():
        raise DataError(
            f"codes: '{text[:80]}' for label '{name}'. Expected SCHEME:VALUE:MEANING of at most {MAX_SCHEME}, "
            f"{MAX_VALUE} and {MAX_MEANING} characters, for example SCT:10200004:Liver. Correct dataset.json.",
            code="dataset_json",
        )
    return Code(value.strip(), scheme.strip(), meaning.strip())


def private_code(name: str) -> Code:
    """Return a code of Sagittal's own scheme for a label that has no other; the same name has the same code."""
    slug = re.sub(r"[^A-Z0-9]+", "_", name.upper()).strip("_")
    if slug != name.upper().replace(" ", "_") or len(slug) > MAX_VALUE:
        slug = f"{slug[: MAX_VALUE - 7]}_{hashlib.sha256(name.encode()).hexdigest()[:6].upper()}".lstrip("_")
    return Code(slug, PRIVATE, told(name, MAX_MEANING))


def told(text: str, most: int) -> str:
    """Return a text as a DICOM string may hold it: printable, without backslashes, cut to `most` characters."""
    plain = " ".join("".join(letter if letter.isprintable() and letter != "\\" else " " for letter in text).split())
    return (plain if len(plain) <= most else plain[: most - 3].rstrip() + "...") or "unnamed"


def _known(name: str) -> Concept | None:
    plain = _plain(name)
    if plain in _TABLE:
        return _TABLE[plain]
    words = plain.split()
    sides = [word for word in words if word in _SIDES]
    if len(sides) == 1 and len(words) > 1:
        words = [word for word in words if word not in _SIDES]
        concept = _without_side(words)
        return None if concept is None else replace(concept, side=_SIDES[sides[0]])
    return _without_side(words) if not sides else None


def _without_side(words: list[str]) -> Concept | None:
    plain = " ".join(words)
    if plain in _TABLE:
        return _TABLE[plain]
    if len(words) == 2 and words[0] in ("rib", "ribs") and words[1].isdigit():
        return _TABLE["rib"]
    for split in range(1, len(words)):
        organ, rest = " ".join(words[:split]), " ".join(words[split:])
        place, kind = _TABLE.get(_ORGAN_WORDS.get(organ, organ)), _TABLE.get(rest)
        if place is None or kind is None or place.category != ANATOMY:
            continue
        if kind.kind.meaning.lower() in _PLACED:
            return Concept(kind.category, kind.kind, place=place.kind)
    return None


def _is_same(first: Code, second: Code) -> bool:
    return (first.value, first.scheme) == (second.value, second.scheme)


def _category_of(name: str) -> Code:
    return ABNORMAL if _ABNORMAL_WORDS.search(name) else ANATOMY
