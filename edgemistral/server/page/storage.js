// The browser's storage, or where it forbids that, something that lasts until the page is closed.

class Memory {
  #values = new Map();
  get length() { return this.#values.size; }
  key(index) { return [...this.#values.keys()][index] ?? null; }
  getItem(key) { return this.#values.get(key) ?? null; }
  setItem(key, value) { this.#values.set(key, String(value)); }
  removeItem(key) { this.#values.delete(key); }
}

function storageOrMemory(name) {
  try {
    window[name].getItem("");
    return window[name];
  } catch {
    return new Memory();
  }
}

export const lasting = storageOrMemory("localStorage");
export const session = storageOrMemory("sessionStorage");   // of this tab
