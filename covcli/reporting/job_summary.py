"""The summary that a pipeline shows on a job's page, in Markdown."""

from collections.abc import Iterable

from covcli.reporting import markdown, tables
from covcli.reporting.documents import EvaluationResult


def summary(result: EvaluationResult, checks: Iterable[object]) -> str:
    """Return an evaluation and its gates as Markdown.

    Parameters
    ----------
    result
        The evaluation.
    checks
        The gates' outcomes; each is worded by `str`.
    """
    return markdown.document(
        [
            f"### covcli: {markdown.escape(result.signature.parameters)}",
            markdown.escape(tables.false_alarms(result)),
            markdown.escape(tables.highest_class(result)),
            markdown.escape(result.guarantee.statement),
            markdown.table(tables.overview(result)),
            markdown.bullets(map(str, checks)),
        ]
    )
