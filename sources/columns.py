"""Columns of a table that need more than one array: categories with their order, values of which some are missing."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Categorical:
    """A column of codes. Its categories keep their order, and those that no row has stay."""

    codes: np.ndarray  # int [rows]; -1 is missing
    categories: np.ndarray  # what the codes mean: text or numbers
    ordered: bool = False  # the order of the categories means something

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: np.ndarray) -> "Categorical":
        return Categorical(self.codes[rows], self.categories, self.ordered)


@dataclass
class Nullable:
    """Values beside a mask: numbers, truth values or text, of which some are missing."""

    values: np.ndarray  # [rows]; where they are missing, anything
    missing: np.ndarray  # bool [rows]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: np.ndarray) -> "Nullable":
        return Nullable(self.values[rows], self.missing[rows])


Column = np.ndarray | Categorical | Nullable
