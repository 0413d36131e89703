Reveal.initialize({ hash: true, width: 1100, height: 680, margin: 0.06, transition: "none", controlsTutorial: false });
