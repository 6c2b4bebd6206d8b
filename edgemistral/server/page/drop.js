// Files that are dragged over the page: onto the list of chats to import them, else into the message.

/** to: addFiles(files), importFiles(files). */
export function watchDrops(to) {
  const side = document.getElementById("side"), sign = document.getElementById("drop");
  const onDrag = (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    const toSide = side.contains(event.target), left = event.type === "dragleave" && !event.relatedTarget;
    sign.hidden = event.type === "drop" || left;
    sign.textContent = toSide ? "Drop a file with chats to import them" : "Drop a text file to add it to the message";
    if (event.type === "drop") (toSide ? to.importFiles : to.addFiles)([...event.dataTransfer.files]);
  };
  for (const type of ["dragenter", "dragover", "dragleave", "drop"]) document.addEventListener(type, onDrag);
}
