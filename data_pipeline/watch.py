"""Says while documents are tokenised what the tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Callable

from data_pipeline.account import Account, described
from data_pipeline.encode import Job
from data_pipeline.records import DataError
from data_pipeline.tokenizer import Tokenizer

_SAMPLE = 256
"""Documents after which it is said for the first time."""


class Watch:
    """Counts documents; tells a person early, and at the end."""

    def __init__(
        self, account: Account, tokenizer: Tokenizer, job: Job, say: Callable[[str], None]
    ) -> None:
        """
        Args:
            account: of the documents that an interrupted run left.
        """
        self._account, self._tokenizer, self._job, self._say = account, tokenizer, job, say
        self._said_of = 0

    def see(self, account: Account) -> None:
        """Count some documents more.

        Raises:
            DataError: with ``lossless``, for a document that does not come back.
        """
        self._account.add(account)
        if self._job.lossless and not account.is_exact:
            raise DataError(
                f"--lossless: {self._job.tokenizer_path} does not give every text back: "
                f"{account.examples[0]}"
            )
        if not self._said_of and self._account.documents >= _SAMPLE:
            self._tell()

    def finish(self) -> None:
        """Say what holds for all documents, unless that was said."""
        if self._account.documents != self._said_of:
            self._tell()

    def _tell(self) -> None:
        self._said_of = self._account.documents
        for line in described(self._account, self._tokenizer, self._job.special.parse):
            self._say(f"tokenizer: {line}")
