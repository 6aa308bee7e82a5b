"""The doctor: finds what is wrong with a data set before anything is trained on it, and writes a repaired copy.

findings.py     what it says
case.py         one case: files, grids, values          structures.py, target.py   what resampling would erase
whole.py        what shows beside the other cases       sides.py       left and right
leaks.py        the same patient or scan in both training and validation
signature.py    the same voxels under another name      diagnosis.py   all of it, one pass over the files
repair.py       the repaired copy                       label_values.py   values that can't be declared
page.py         the page with a picture per finding
"""

from sagittal.data.doctor.diagnosis import diagnose
from sagittal.data.doctor.findings import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]
