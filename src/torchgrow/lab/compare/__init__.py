"""Methods side by side on one recipe: grown, thinned, pruned and dense networks, for several seeds and budgets.

Every finished (method, seed, budget) is one line of a results file, written once it is finished and never again.
"""

from torchgrow.lab.compare.comparison import RESULTS, compare, recorded
from torchgrow.lab.compare.job import Job, after, decisive, growing
from torchgrow.lab.compare.results_file import Rows

__all__ = ["RESULTS", "Job", "Rows", "after", "compare", "decisive", "growing", "recorded"]
