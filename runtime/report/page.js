// Sorting, filtering, column choice, hints, copying and the theme. The page is whole without any of it.
(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("js");
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Theme: the system's until the reader chooses.
  const toggle = document.getElementById("theme");
  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const say = () => {
    toggle.textContent = isDark() ? "Light" : "Dark";
    toggle.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
  };
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    say();
  });
  say();

  // Sorting: the first body sorts, the second (reference and base) stays below. Rows without a figure come last.
  const key = (row, index) => {
    const raw = row.cells[index].dataset.value;
    return raw === undefined || raw === "" ? null : Number.isNaN(Number(raw)) ? raw : Number(raw);
  };
  const compare = (a, b, way) => {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a === "number" && typeof b === "number") return (a - b) * way;
    return String(a).localeCompare(String(b)) * way;
  };
  const status = document.getElementById("status");
  all("table.sortable").forEach((table) => {
    all("th[aria-sort] button", table).forEach((button) => {
      button.addEventListener("click", () => {
        const head = button.closest("th");
        const rising = head.getAttribute("aria-sort") !== "ascending";
        all("th[aria-sort]", table).forEach((th) => th.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", rising ? "ascending" : "descending");
        const body = table.tBodies[0];
        [...body.rows]
          .map((row, place) => ({ row, place, key: key(row, head.cellIndex) }))
          .sort((a, b) => compare(a.key, b.key, rising ? 1 : -1) || a.place - b.place)
          .forEach(({ row }) => body.append(row));
        status.textContent = `Sorted by ${button.dataset.name}, ${rising ? "ascending" : "descending"}`;
      });
    });
  });

  // Filtering: only candidates leave the table; what they are compared with stays.
  const search = document.getElementById("search");
  if (search) {
    const only = document.getElementById("only");
    const found = document.getElementById("found");
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/);
      const rows = [...document.getElementById("table").tBodies[0].rows];
      rows.forEach((row) => {
        const text = row.cells[0].textContent.toLowerCase();
        row.hidden = !["", row.dataset.verdict].includes(only.value) || !words.every((word) => text.includes(word));
      });
      const shown = rows.filter((row) => !row.hidden).length;
      found.textContent = shown === rows.length ? "" : `${shown} of ${rows.length} candidates`;
    };
    search.addEventListener("input", filter);
    only.addEventListener("change", filter);
    filter(); // a browser may remember what was typed
  }

  // Choices: which columns a table shows, which of several pictures stands.
  all(".choice").forEach((group) => {
    const target = document.getElementById(group.dataset.for);
    const apply = () => {
      const chosen = group.querySelector("input:checked");
      if (chosen) target.dataset.show = chosen.value;
      all("[data-part]", target).forEach((part) => {
        part.hidden = part.dataset.part !== chosen.value;
      });
    };
    group.addEventListener("change", apply);
    apply();
  });

  // Hints: the same text is in the page for those who do not hover.
  const tip = document.getElementById("tip");
  const hide = () => {
    tip.hidden = true;
  };
  const show = (element) => {
    tip.textContent = element.dataset.tip;
    tip.hidden = false;
    const box = element.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
  };
  const hinted = (event) => (event.target instanceof Element ? event.target.closest("[data-tip]") : null);
  document.addEventListener("pointerover", (event) => (hinted(event) ? show(hinted(event)) : hide()));
  document.addEventListener("focusin", (event) => (hinted(event) ? show(hinted(event)) : hide()));
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, true);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());

  // Copying: the clipboard may be closed to a page on disk; then the text is selected for the reader.
  all("button.copy").forEach((button) => {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      status.textContent = button.textContent;
      setTimeout(() => {
        button.textContent = "Copy";
      }, 1600);
    });
  });

  // Paper unfolds nothing.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = all("details:not([open])");
    folded.forEach((details) => details.setAttribute("open", ""));
  });
  addEventListener("afterprint", () => folded.forEach((details) => details.removeAttribute("open")));
})();
