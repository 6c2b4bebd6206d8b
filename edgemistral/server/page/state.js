// Whether the server is there, and which model it has.

import { announce } from "./dom.js";
import { call, health, setKey } from "./server.js";

const LOOK_AGAIN = 1500;   // ms, while it loads or is away
const NAMES = { loading: "Loading the model", away: "Not connected", locked: "Needs an API key" };

export class Server {
  context = 0;   // tokens that the model can read and write
  #state = "loading";
  #watching = false;
  #sign = document.getElementById("server");
  #dialog = document.getElementById("locked");

  /** changed(): it came or went. ready(): it came. */
  constructor({ changed, ready }) {
    Object.assign(this, { changed, onready: ready });
    const key = document.getElementById("key");
    this.#dialog.querySelector("button").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("submit", () => {
      setKey(key.value.trim());
      key.value = "";
      this.watch();
    });
    this.#sign.addEventListener("click", () => {
      if (this.#state === "locked") this.#dialog.showModal();
      else this.watch();
    });
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.watch(); });
  }

  get ready() {
    return this.#state === "ready";
  }

  /** Look until it is there. */
  async watch() {
    if (this.#watching) return;
    this.#watching = true;
    while (!await this.#look()) await new Promise((resolve) => { setTimeout(resolve, LOOK_AGAIN); });
    this.#watching = false;
  }

  /** What went wrong with a request may mean that the server did. */
  failed({ status, code }) {
    if (status === 401) this.#lock();
    else if (code === "unreachable" || code === "broken" || status === 503) this.watch();
  }

  async #look() {
    try {
      if ((await health()).status === "loading") {
        this.#enter("loading");
        return false;
      }
      const [model] = (await (await call("v1/models")).json()).data;
      this.context = model.max_model_len;
      this.#enter("ready", model.id);
    } catch (failure) {
      if (failure.status === 401) {
        this.#lock();
        return true;
      }
      this.#enter("away");
      return false;
    }
    return true;
  }

  #lock() {
    this.#enter("locked");
    if (!this.#dialog.open) this.#dialog.showModal();
  }

  #enter(state, name = NAMES[state]) {
    if (state === this.#state && name === this.#sign.textContent) return;
    const came = state === "ready" && this.#state !== "ready";
    this.#state = state;
    announce(name);
    this.#sign.dataset.state = state;
    this.#sign.textContent = name;
    this.#sign.title = name;
    if (came) this.onready();
    this.changed();
  }
}
