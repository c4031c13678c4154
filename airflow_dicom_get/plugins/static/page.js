"use strict";

// The page follows Airflow's own choice of light or dark, where it stands in Airflow's frame.
(function followTheme() {
  let outer = null;
  try {
    outer = parent !== window ? parent.document.documentElement : null;
  } catch (error) {
    return; // The frame is not Airflow's: the system's choice holds.
  }
  if (outer === null) return;
  const apply = () => {
    const theme = ["dark", "light"].find((name) => outer.classList.contains(name));
    if (theme) document.documentElement.dataset.theme = theme;
  };
  apply();
  new MutationObserver(apply).observe(outer, { attributes: true, attributeFilter: ["class"] });
})();

// Airflow's frame lets no link leave it, and would show a second Airflow inside: the outer one has to go there.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-outer], a[data-airflow]");
  if (!link || parent === window || event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
  let path = link.getAttribute("href");
  if (link.dataset.airflow) {
    // Within the page's own entry the link is as good as any.
    if (parent.location.pathname.includes(link.dataset.airflow)) return;
    path = path.replace(/\/dicom-get\/$/, "") + link.dataset.airflow;
  }
  try {
    parent.history.pushState({}, "", path);
    parent.dispatchEvent(new PopStateEvent("popstate"));
    event.preventDefault();
  } catch (error) {
    // The link itself is left.
  }
});

document.addEventListener("DOMContentLoaded", () => {
  const live = document.querySelector("[data-progress]");
  if (!live) return;
  const bar = live.querySelector("progress");
  const text = live.querySelector("p");
  const look = async () => {
    if (!document.hidden) {
      try {
        const answer = await fetch(live.dataset.progress, { headers: { accept: "application/json" } });
        if (answer.status === 401) {
          text.textContent = "Your session has ended. Reload this page to sign in.";
          return;
        }
        if (answer.ok) {
          const now = await answer.json();
          if (!now.live) {
            location.reload();
            return;
          }
          text.textContent = now.text;
          if (now.progress && now.progress.total) {
            bar.max = now.progress.total;
            bar.value = now.progress.done || 0;
          }
        }
      } catch (error) {
        // The next look may reach the server again.
      }
    }
    setTimeout(look, 2500);
  };
  setTimeout(look, 1000);
});
