"The runner is killed without warning, again and again; its ledger and the venue's books must tell the same story."
