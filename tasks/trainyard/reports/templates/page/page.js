"use strict";
(() => {
  const REFRESH_MS = 3000;
  // As in platform/request.py.
  const ENDED = ["success", "failed"];
  const MOST_ATTEMPTS = 50;
  const ASKED_BEFORE = "This was asked for already.";
  const root = document.documentElement;

  // The page stands in a frame of Airflow, on the same origin: it takes its light or dark from there.
  const outside = (() => {
    try {
      return window.parent === window ? null : window.parent.document;
    } catch {
      return null;
    }
  })();
  const follow = () => {
    const theme = outside.documentElement.classList;
    for (const name of ["light", "dark"]) root.classList.toggle(name, theme.contains(name));
  };
  if (outside) {
    follow();
    new MutationObserver(follow).observe(outside.documentElement, { attributeFilter: ["class"] });
  }

  // The frame may not navigate the window around it, but that window's own links may.
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-airflow]");
    if (!link || !outside || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const outer = outside.createElement("a");
    outer.href = link.href;
    outside.body.append(outer);
    outer.click();
    outer.remove();
  });

  const start = () => {
    keepLive();
    // Some of these buttons come and go with what is live.
    document.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-opens]");
      if (button) open(button);
    });
    for (const button of document.querySelectorAll("button[data-closes]")) {
      button.addEventListener("click", () => button.closest("dialog").close());
    }
    for (const form of document.querySelectorAll("form[data-verb]")) {
      form.addEventListener("submit", (event) => {
        event.preventDefault();
        ask(form, event.submitter?.value ?? "");
      });
    }
    // Where there are two answers, the Enter key in a field chooses neither.
    document.getElementById("answer-note")?.addEventListener("keydown", (event) => {
      if (event.key === "Enter") event.preventDefault();
    });
  };

  // --- what is shown is what is -----------------------------------------------------------------

  const keepLive = () => {
    const sign = document.getElementById("live-sign");
    const part = document.getElementById("live");
    if (!part || !sign) return;
    const say = (state, words) => {
      sign.dataset.state = state;
      // Read aloud when something is wrong, not every few seconds.
      if (state === "lost") sign.setAttribute("role", "alert");
      else sign.removeAttribute("role");
      sign.textContent = words;
    };
    const clock = () => new Date().toLocaleTimeString();
    let waiting = false;
    const refresh = async () => {
      if (document.hidden || waiting) return;
      waiting = true;
      try {
        const answer = await fetch(location.href, { credentials: "same-origin" });
        if (answer.status === 401) return say("lost", "Your login has ended: reload the page");
        if (!answer.ok) throw new Error(String(answer.status));
        // Its style has a nonce of its own, which would not fit here, and is not needed.
        const html = (await answer.text()).replace(/<style[^]*?<\/style>/, "");
        const fresh = new DOMParser().parseFromString(html, "text/html");
        const now = fresh.getElementById("live");
        if (!now) throw new Error("another page");
        if (now.innerHTML !== part.innerHTML) renew(part, now);
        part.dataset.generation = now.dataset.generation;
        part.dataset.state = now.dataset.state;
        showWhatApplies();
        say("on", `Live, as of ${clock()}`);
      } catch (error) {
        say("lost", `No answer at ${clock()}; this is older (${error.message})`);
      } finally {
        waiting = false;
      }
    };
    say("on", `Live, as of ${clock()}`);
    showWhatApplies();
    setInterval(refresh, REFRESH_MS);
    document.addEventListener("visibilitychange", refresh);
  };

  // Replaces what is shown; the keyboard stays on the link or button where it was.
  const renew = (part, now) => {
    const links = () => [...part.querySelectorAll("a, button")];
    const goesTo = (link) => link.getAttribute("href") ?? link.dataset.path;
    const before = links();
    const index = before.indexOf(document.activeElement);
    const same = (link) => goesTo(link) === goesTo(before[index]);
    const nth = index < 0 ? -1 : before.filter(same).indexOf(before[index]);
    part.replaceChildren(...document.importNode(now, true).childNodes);
    if (index >= 0) {
      const after = links();
      (after.filter(same)[nth] ?? after[index])?.focus({ preventScroll: true });
    }
  };

  const showWhatApplies = () => {
    const { state } = document.getElementById("live").dataset;
    for (const each of document.querySelectorAll("[data-while]")) {
      each.hidden = !each.dataset.while.split(" ").includes(state);
    }
  };

  // --- actions: ask first, then ask Airflow ------------------------------------------------------

  const open = (button) => {
    const dialog = document.getElementById(button.dataset.opens);
    const form = dialog.querySelector("form");
    for (const name of ["path", "run", "subject"]) {
      if (name in button.dataset) form.dataset[name] = button.dataset[name];
    }
    for (const place of form.querySelectorAll("[data-shows=subject]")) {
      place.textContent = form.dataset.subject;
    }
    for (const link of form.querySelectorAll("[data-release-of]")) {
      link.href = link.dataset.releaseOf + encodeURIComponent(form.dataset.subject);
    }
    // From here on a repeated click is the same request.
    form.dataset.generation = document.getElementById("live").dataset.generation;
    form.querySelector(".answer").textContent = "";
    enable(form, true);
    dialog.showModal();
  };

  const enable = (form, enabled) => {
    for (const button of form.querySelectorAll("button[type=submit]")) button.disabled = !enabled;
  };

  const ask = async (form, choice) => {
    const answer = form.querySelector(".answer");
    enable(form, false);
    answer.className = "answer";
    answer.textContent = "Asking Airflow …";
    try {
      const act = { abort, answer: answerQuestion }[form.dataset.verb] ?? startRun;
      const { words, dag, runId } = await act(form, choice);
      done(answer, words, dag ?? form.dataset.dag, runId);
    } catch (error) {
      enable(form, true);
      answer.className = "answer fail";
      answer.textContent = error.message;
    }
  };

  const abort = async (form) => {
    const marked = await call(form.dataset.path, "PATCH", { new_state: "failed" });
    return { words: marked ? form.dataset.done : ASKED_BEFORE, runId: form.dataset.run };
  };

  const answerQuestion = async (form, choice) => {
    const note = new FormData(form).get("note");
    const body = { chosen_options: [choice], params_input: { note } };
    const answered = await call(form.dataset.path, "PATCH", body);
    const [dag, ...rest] = form.dataset.run.split("/");
    const words = answered ? form.dataset.done : "Somebody has just answered: look again.";
    return { words, dag, runId: rest.join("/") };
  };

  // As platform/request.py: a run under way is the one that is wanted; after one that has ended, or
  // that is about something else, comes the next.
  const startRun = async (form) => {
    const { path, done: words } = form.dataset;
    const { conf, runId: first } = wantedBy(form);
    const body = { logical_date: null, conf, note: "Asked for on the Trainyard page" };
    for (let attempt = 1; attempt <= MOST_ATTEMPTS; attempt += 1) {
      const runId = attempt === 1 ? first : `${first}__${attempt}`;
      if (await call(path, "POST", { ...body, dag_run_id: runId })) return { words, runId };
      const found = await call(`${path}/${encodeURIComponent(runId)}`, "GET");
      if (!isSame(found.conf, conf)) continue;
      if (!ENDED.includes(found.state)) return { words: ASKED_BEFORE, runId };
      if (form.dataset.verb === "rollback" && !conf.release) {
        // Again would be refused: nothing is left to undo.
        if (found.state === "success") return { words: "This was done already.", runId };
        if (form.dataset.generation !== document.getElementById("live").dataset.generation) {
          throw new Error(`The channel has changed since ${runId} failed: close this and look first.`);
        }
      }
    }
    throw new Error(`This was asked for ${MOST_ATTEMPTS} times: see why its runs fail.`);
  };

  const isSame = (left, right) => {
    const names = Object.keys(left ?? {});
    return (
      names.length === Object.keys(right).length && names.every((name) => left[name] === right[name])
    );
  };

  // Returns what Airflow answers; nothing when what is asked for is there already (409).
  const call = async (path, method, body) => {
    const response = await fetch(path, {
      method,
      credentials: "same-origin",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    }).catch((error) => {
      throw new Error(`Airflow did not answer: ${error.message}`);
    });
    if (response.ok) return response.json();
    if (response.status === 409) return null;
    const reason = reasonIn(await response.text());
    throw new Error(`Airflow refused (${response.status}): ${reason}`);
  };

  const wantedBy = (form) => {
    const fields = new FormData(form);
    const conf = { model: form.dataset.model };
    for (const [name, value] of fields) {
      if (name === "force") conf.force = true;
      else if (value !== "") conf[name] = value;
    }
    const subject = conf.release || form.dataset.model;
    return { conf, runId: `${form.dataset.verb}__${subject}__g${form.dataset.generation}` };
  };

  const done = (answer, words, dag, runId) => {
    answer.className = "answer pass";
    answer.textContent = `${words} `;
    const link = document.createElement("a");
    const airflow = document.getElementById("content").dataset.airflow;
    link.href = `${airflow}/dags/${encodeURIComponent(dag)}/runs/${encodeURIComponent(runId)}`;
    link.dataset.airflow = "";
    link.textContent = "See the run";
    answer.append(link);
  };

  const reasonIn = (text) => {
    try {
      const { detail } = JSON.parse(text);
      return typeof detail === "string" ? detail : JSON.stringify(detail);
    } catch {
      return text.slice(0, 300);
    }
  };

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
