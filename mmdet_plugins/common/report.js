const dialog = document.querySelector('dialog'), large = dialog.querySelector('img');
for (const button of document.querySelectorAll('.views button')) {
  button.addEventListener('click', () => {
    const small = button.querySelector('img');
    large.src = small.src;
    large.alt = dialog.querySelector('p').textContent = small.alt;
    dialog.showModal();
  });
}
dialog.addEventListener('click', () => dialog.close());
