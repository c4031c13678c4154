"""Airflow as its user sees it: makes a connection, tests it, triggers a DAG, watches the tab, opens the page.

The tests follow each other on one Airflow. With SCREENSHOTS=docs/images the pictures of the documentation are made
anew.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.testing.s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY
from tests.support.chromium import signed_in_page, take_picture

HELD = "All that the PACS lists is held and verified, and two lists in a row agree."
FORM_ERRORS = {
    "wrong-ae": ({"host": "127.0.0.1", "login": "NOBODY"}, {}, "called AE title not recognised"),
    "closed-port": ({"host": "127.0.0.1", "port": "1", "login": "PACS"}, {}, "Connection refused"),
    "long-ae": (
        {"host": "127.0.0.1", "login": "PACS"},
        {"calling_ae_title": "AIRFLOW-OF-THE-HOSPITAL"},
        "calling_ae_title: the AE title 'AIRFLOW-OF-THE-HOSPITAL' has 23 characters",
    ),
    "no-host": ({"login": "PACS"}, {}, "host is missing"),
    # Airflow's own up to 3.3: it compares the port that it sends, 0, with the one that it stored, none.
    "no-port": (
        {"host": "127.0.0.1", "port": "", "login": "PACS"},
        {},
        re.compile("Bad Request|port is missing"),
    ),
}

# By name: standard fields, extra fields, and what the message says.
S3_FORM_ERRORS = {
    "s3-closed-port": ({"port": "1"}, {}, "at http://127.0.0.1:1: S3 put_object"),
    "s3-wrong-key": ({"password": "not-the-secret"}, {}, "SignatureDoesNotMatch"),
    "s3-no-such-bucket": ({}, {"bucket": "nowhere"}, "NoSuchBucket"),
    "s3-no-bucket": ({}, {"bucket": ""}, "bucket is blank, so there is nothing to test"),
    "s3-scheme-in-host": ({"host": "http://127.0.0.1"}, {}, "host: 'http://127.0.0.1' contains a scheme"),
    "s3-https": ({}, {"scheme": "https"}, "SSLError. Check the scheme of the endpoint"),
}


@pytest.fixture
def picture(signed_in, tmp_path):
    """Take a screenshot; into the documentation where SCREENSHOTS names its folder."""

    def take(name: str) -> None:
        take_picture(signed_in, name, tmp_path)

    return take


def make_connection(page: Any, site: Any, conn_id: str, fields: dict[str, str], extras: dict[str, str]) -> Any:
    """Fill the form of a PACS, and leave it open."""
    return fill_form(page, site, conn_id, "DICOM (PACS)", {"port": str(site.pacs.port)} | fields, extras)


def make_bucket_connection(
    page: Any, site: Any, conn_id: str, server: Any, fields: dict[str, str], extras: dict[str, str]
) -> Any:
    """Fill the form of a bucket, and leave it open."""
    standard = {"host": server.host, "port": str(server.port), "login": ACCESS_KEY, "password": SECRET_KEY}
    more = {"scheme": "http", "bucket": BUCKET}
    return fill_form(page, site, conn_id, "DICOM storage (S3)", standard | fields, more | extras)


def fill_form(page: Any, site: Any, conn_id: str, kind: str, fields: dict[str, str], extras: dict[str, str]) -> Any:
    """Fill the form of a connection of some type, and leave it open."""
    page.goto(f"{site.address}/connections")
    page.get_by_role("button", name="Add Connection").click()
    form = page.get_by_role("dialog")
    form.locator("input[name=connection_id]").fill(conn_id)
    form.locator("input[role=combobox]").first.click(force=True)
    page.get_by_role("option", name=kind).click()
    form.locator("input[name=host]").wait_for()
    for name, value in fields.items():
        form.locator(f"input[name={name}]").fill(value)
    open_section(form, "Extra Fields")
    form.locator("[name^=element_]").first.wait_for(state="attached")
    page.wait_for_timeout(500)
    for name, value in extras.items():
        field = form.locator(f"[name=element_{name}]")
        if field.get_attribute("type") == "hidden":
            # The field of a list of choices shows another input, beside it.
            field.locator("xpath=..").locator("input[role=combobox]").click(force=True)
            page.get_by_role("option", name=value, exact=True).click()
        else:
            field.fill(value)
    return form


def open_section(form: Any, name: str) -> None:
    """Open a section of the form, if it can be closed: Airflow 3.4 shows them all below each other."""
    button = form.get_by_role("button", name=name, exact=True)
    if button.count():
        button.click()


def save_and_test(page: Any, form: Any, conn_id: str) -> Any:
    """Save the form, and press Test; gives the button."""
    form.get_by_role("button", name="Save").click()
    form.wait_for(state="hidden")
    row = page.get_by_role("row").filter(has=page.get_by_text(conn_id, exact=True))
    button = row.get_by_role("button", name="Test Connection")
    button.click()
    return button


def test_a_connection_by_the_form(site, signed_in, picture):
    page = signed_in
    form = make_connection(
        page, site, "dicom_default", {"host": "127.0.0.1", "login": "PACS"}, {"calling_ae_title": "AIRFLOW"}
    )
    picture("connection-extra-fields")
    open_section(form, "Standard Fields")
    page.wait_for_timeout(500)
    for label in ("PACS host", "PACS port", "Called AE title", "TLS key passphrase"):
        assert form.get_by_text(label, exact=True).is_visible(), label
    picture("connection-standard-fields")
    button = save_and_test(page, form, "dicom_default")
    button.locator("svg[color=green]").wait_for()
    picture("connection-test-good")


@pytest.mark.parametrize("name", FORM_ERRORS)
def test_a_connection_that_is_wrong_says_what_to_mend(site, signed_in, picture, name):
    fields, extras, text = FORM_ERRORS[name]
    form = make_connection(signed_in, site, name, fields, extras)
    button = save_and_test(signed_in, form, name)
    message = signed_in.get_by_text(text).first
    message.wait_for()
    button.locator("svg[color=red]").wait_for()
    picture(f"connection-test-{name}")


def test_a_bucket_by_the_form(site, signed_in, picture, juicefs):
    page = signed_in
    form = make_bucket_connection(page, site, "imaging", juicefs, {}, {})
    picture("connection-s3-extra-fields")
    open_section(form, "Standard Fields")
    page.wait_for_timeout(500)
    for label in ("Endpoint host (blank: AWS)", "Endpoint port (always give one)", "Access key", "Secret key"):
        assert form.get_by_text(label, exact=True).is_visible(), label
    picture("connection-s3-standard-fields")
    button = save_and_test(page, form, "imaging")
    button.locator("svg[color=green]").wait_for()
    picture("connection-s3-test-good")
    assert juicefs.objects() == {}


@pytest.mark.parametrize("name", S3_FORM_ERRORS)
def test_a_bucket_that_is_wrong_says_what_to_mend(site, signed_in, picture, juicefs, name):
    fields, extras, text = S3_FORM_ERRORS[name]
    form = make_bucket_connection(signed_in, site, name, juicefs, fields, extras)
    button = save_and_test(signed_in, form, name)
    button.locator("svg[color=red]").wait_for()
    signed_in.get_by_text(text).first.wait_for()
    picture(f"connection-test-{name}")


def trigger(page: Any, site: Any) -> None:
    page.goto(f"{site.address}/dags/retrieve_studies")
    page.get_by_role("button", name="Trigger").first.click()
    page.get_by_role("dialog").get_by_role("button", name="Trigger").last.click()
    page.wait_for_url(re.compile("/runs/"))


def open_list(page: Any) -> Any:
    page.get_by_role("button", name="Browse").click()
    page.get_by_text("DICOM retrievals").click()
    frame = page.frame_locator("iframe")
    frame.get_by_role("heading", name="DICOM retrievals").wait_for()
    return frame


def patiently(page: Any, frame: Any, row: Any) -> None:
    """Reload the list until it has a row."""
    until = time.monotonic() + 180
    while not row.count():
        assert time.monotonic() < until, frame.locator("tbody tr").all_inner_texts()[:30]
        page.wait_for_timeout(1000)
        frame.get_by_role("button", name="Show").click()
        frame.get_by_role("heading", name="DICOM retrievals").wait_for()


def test_a_retrieval_is_watched_and_listed(site, signed_in, picture):
    page = signed_in
    site.airflow.run(str(Path(__file__).with_name("history.py")))
    site.pacs.before_send = lambda uid: time.sleep(0.3)
    trigger(page, site)
    frame = open_list(page)
    running = frame.locator("tbody tr", has_text="60 of 60").or_(
        frame.locator("tbody tr", has_text="running").filter(has_text="CT")
    )
    patiently(page, frame, running)
    # The page, its row, the task in Airflow, the tab there.
    frame.locator("tbody tr", has_text="running").filter(has_text=site.many).get_by_role("link").click()
    frame.locator("progress").wait_for()
    frame.get_by_role("link", name="and its log").click()
    page.wait_for_url(re.compile(r"/tasks/get/mapped/\d$"))
    page.get_by_role("link", name="DICOM manifest").click()
    tab = page.frame_locator("iframe")
    tab.get_by_text(re.compile(r"\d+ of 60 instances, .*/s")).wait_for()
    before = int(tab.locator("progress").get_attribute("value"))
    picture("tab-running")
    page.wait_for_function(
        "before => Number(frames[0].document.querySelector('progress')?.value ?? 99) > before", arg=before
    )
    # It becomes the result by itself.
    tab.get_by_text(HELD).wait_for(timeout=60_000)
    assert tab.get_by_text("60 of 60").is_visible()
    picture("tab-complete")
    with page.expect_download() as download:
        tab.get_by_role("link", name="Download as CSV (60 rows)").click()
    assert len(Path(download.value.path()).read_text().splitlines()) == 61
    tab.get_by_role("link", name="All DICOM retrievals").click()
    page.wait_for_url(re.compile("/plugin/dicom-get"))
    site.pacs.before_send = None


def test_the_link_of_the_task_opens_the_tab(site, signed_in):
    page = signed_in
    newest = {"order_by": "-run_after", "limit": 1}
    run = site.airflow.call("GET", "/dags/retrieve_studies/dagRuns", params=newest)["dag_runs"][0]["dag_run_id"]
    tasks = site.airflow.call("GET", f"/dags/retrieve_studies/dagRuns/{run}/taskInstances", params={"task_id": "get"})
    index = next(one["map_index"] for one in tasks["task_instances"] if site.many in one["rendered_map_index"])
    page.goto(f"{site.address}/dags/retrieve_studies/runs/{run}/tasks/get/mapped/{index}/details")
    # The tab has the same name, and is a link as well.
    link = page.get_by_text("Extra Links", exact=True).locator("xpath=..").get_by_role("link", name="DICOM manifest")
    link.click()
    page.wait_for_url(re.compile(rf"/tasks/get/mapped/{index}/plugin/dicom-manifest$"))
    tab = page.frame_locator("iframe")
    tab.get_by_text(HELD).wait_for()
    assert tab.get_by_text("60 of 60").is_visible()


def test_what_is_missing_is_seen_with_its_reason(site, signed_in, picture, many_uids):
    page = signed_in
    site.pacs.fail = set(many_uids[10:14])
    # Elsewhere, so that nothing is there yet.
    for file in site.retrieved.rglob("*"):
        if file.is_file():
            file.unlink()
    trigger(page, site)
    frame = open_list(page)
    partial = frame.locator("tbody tr", has_text="56 of 60")
    patiently(page, frame, partial)
    picture("page")
    assert "partial" in frame.locator("tbody tr").first.inner_text()
    partial.first.get_by_role("link").click()
    frame.get_by_text("4 instances not held").wait_for()
    for uid in many_uids[10:14]:
        assert frame.get_by_text(uid).is_visible()
    picture("task-partial")
    # The same in the dark, as Airflow is switched to it.
    page.evaluate("localStorage.setItem('theme', 'dark')")
    page.reload()
    frame = page.frame_locator("iframe")
    frame.get_by_text("4 instances not held").wait_for()
    colour = "getComputedStyle(document.body).backgroundColor"
    assert frame.locator("body").evaluate(colour) == "rgb(14, 17, 22)"
    picture("task-partial-dark")
    # Airflow's own entry does nothing while the page is open.
    frame.get_by_role("link", name="All DICOM retrievals").click()
    frame.get_by_role("heading", name="DICOM retrievals").wait_for()
    picture("page-dark")
    page.evaluate("localStorage.setItem('theme', 'light')")
    page.reload()
    site.pacs.fail = set()


def test_a_viewer_sees_the_page_and_the_tab_and_may_not_test_a_connection(site, browser):
    with signed_in_page(browser, site.airflow, "viewer") as page:
        frame = open_list(page)
        frame.locator("tbody tr", has_text="56 of 60").first.get_by_role("link").click()
        frame.get_by_text("4 instances not held").wait_for()
        frame.get_by_role("link", name="and its log").click()
        page.wait_for_url(re.compile(r"/tasks/get/mapped/\d$"))
        page.get_by_role("link", name="DICOM manifest").click()
        page.frame_locator("iframe").get_by_text("4 instances not held").wait_for()
        assert page.goto(f"{site.address}/api/v2/connections").status == 403


@pytest.fixture
def many_uids(site):
    from pydicom import dcmread

    files = sorted((site.held / "many").glob("*.dcm"))
    return [str(dcmread(file, stop_before_pixels=True).SOPInstanceUID) for file in files]


def test_the_keyboard_reaches_everything(site, signed_in):
    page = signed_in
    page.goto(f"{site.address}/dicom-get/")
    page.set_viewport_size({"width": 700, "height": 900})
    reached = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + ':' + (document.activeElement.name || '')"))
    assert {"SELECT:dag_id", "SELECT:verdict", "SELECT:source", "INPUT:since", "BUTTON:", "A:", "DIV:"} <= reached
    # The table scrolls, the page does not.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("select[name=verdict]").select_option("partial")
    page.locator("select[name=verdict]").press("Tab")
    page.get_by_role("button", name="Show").press("Enter")
    page.wait_for_url(re.compile("verdict=partial"))
    assert {row.split()[0] for row in page.locator("tbody tr").all_inner_texts()} == {"partial"}
    page.set_viewport_size({"width": 1440, "height": 900})


def test_the_browser_complains_of_nothing(site, signed_in):
    page = signed_in
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"{site.address}/dicom-get/")
    page.locator("tbody a").first.click()
    page.get_by_role("heading").first.wait_for()
    assert said == []


def test_without_a_session_the_frame_says_so(site, browser):
    context = browser.new_context()
    page = context.new_page()
    answer = page.goto(f"{site.address}/dicom-get/")
    assert answer.status == 401
    assert "Reload this page to sign in" in page.inner_text("body")
    context.close()
