"""The report as JUnit XML, for continuous integration."""

from __future__ import annotations

from xml.etree import ElementTree

from compot_deploy.core.diagnostics import errors
from compot_deploy.report.document import Report
from compot_deploy.report.figures import printable


def to_junit(report: Report) -> str:
    """JUnit XML: one test case per criterion of the gate and per diagnostic of the lint.

    A failed criterion and a diagnostic of severity ``error`` are failures; warnings and notes pass, and say in
    their output what they found.
    """
    suites = ElementTree.Element("testsuites", name="compot-deploy")
    failures = sum(not criterion.passed for criterion in report.accuracy.gate.criteria)
    failures += len(errors(report.diagnostics))
    suite = ElementTree.SubElement(
        suites,
        "testsuite",
        name=printable(f"compot-deploy: {report.artifact}"),
        tests=str(len(report.accuracy.gate.criteria) + len(report.diagnostics)),
        failures=str(failures),
        errors="0",
        skipped="0",
        timestamp=printable(report.created),
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (
        ("model", report.model),
        ("format", report.format),
        ("artifact_bytes", str(report.sizes.artifact)),
        ("metrics_version", str(report.accuracy.metrics_version)),
    ):
        ElementTree.SubElement(properties, "property", name=name, value=printable(value))
    for criterion in report.accuracy.gate.criteria:
        case = ElementTree.SubElement(
            suite, "testcase", classname="compot_deploy.gate", name=printable(criterion.name), time="0"
        )
        tag = "system-out" if criterion.passed else "failure"
        detail = ElementTree.SubElement(case, tag)
        detail.text = printable(criterion.sentence)
        if not criterion.passed:
            detail.attrib.update(type="gate", message=printable(criterion.sentence))
    for diagnostic in report.diagnostics:
        case = ElementTree.SubElement(
            suite, "testcase", classname="compot_deploy.lint", name=printable(diagnostic.where), time="0"
        )
        failed = diagnostic.severity == "error"
        detail = ElementTree.SubElement(case, "failure" if failed else "system-out")
        detail.text = printable(f"{diagnostic.severity}: {diagnostic.sentence}")
        if failed:
            detail.attrib.update(type="lint", message=printable(diagnostic.sentence))
    ElementTree.indent(suites)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"
    )
