"""The report of a dataset's version: written once, shown in Prefect, kept with the parent run in MLflow."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_markdown_artifact

from data.report import HTML, report_folder, summary, write_report
from data.versioning import DatasetVersion
from flows.say import say, warn
from flows.settings import REPO, Settings
from tracking.client import connect
from tracking.runs import upload


@task(name="report-data", task_run_name="report {version.name}")
def report_data(version: DatasetVersion, settings: Settings, parent_run_id: str | None) -> None:
    """Write the report and publish it. Training goes on without it: what goes wrong here is said, not raised."""
    try:
        report = write_report(version.name, version.version, REPO)
        folder = report_folder(version.name, version.version, REPO)
        say(f"{version.name}: report {folder / HTML}")
        lines = [f"# {version.name}", "", *(f"- {line}" for line in summary(report)), "", f"`{folder / HTML}`"]
        create_markdown_artifact(
            key=f"data-{version.name}",
            markdown="\n".join(lines),
            description=f"What version {version.version[:12]} holds",
        )
        if parent_run_id is not None:
            upload(connect(settings.tracking_uri), parent_run_id, folder, under=f"data/{version.name}")
    except Exception as error:
        warn(f"{version.name}: the report of version {version.version[:12]} is missing or incomplete: {error}")
