"""Reports during tokenisation how exactly the tokenizer reproduces documents."""

from __future__ import annotations

from collections.abc import Callable

from data_pipeline.account import Account, described
from data_pipeline.encode import EncodingSettings
from data_pipeline.records import DataError
from data_pipeline.tokenizer import Tokenizer

_SAMPLE = 256
"""Number of documents after which the first report is made."""


class Watch:
    """Counts documents and reports early and at the end."""

    def __init__(
        self,
        account: Account,
        tokenizer: Tokenizer,
        settings: EncodingSettings,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            account: counts over the documents of an interrupted run.
        """
        self._account, self._tokenizer, self._settings, self._say = (
            account,
            tokenizer,
            settings,
            say,
        )
        self._said_of = 0

    def see(self, account: Account) -> None:
        """Count more documents.

        Raises:
            DataError: with ``lossless``, for a document that is not reproduced.
        """
        self._account.add(account)
        if self._settings.lossless and not account.is_exact:
            raise DataError(
                f"--lossless: {self._settings.tokenizer_path} does not reproduce every text: "
                f"{account.examples[0]}"
            )
        if not self._said_of and self._account.documents >= _SAMPLE:
            self._tell()

    def finish(self) -> None:
        """Report the result for all documents, unless it was reported already."""
        if self._account.documents != self._said_of:
            self._tell()

    def _tell(self) -> None:
        self._said_of = self._account.documents
        for line in described(self._account, self._tokenizer, self._settings.special.parse):
            self._say(f"tokenizer: {line}")
